"""Options of the commands as frozen dataclasses, parsed by tyro, written by every run and read back by --config."""

import json
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import cattrs
import tyro

from dpo_jax import __version__
from dpo_jax.cli.catalogue import Method, options_class
from dpo_jax.cli.console import OutputConfig, UsageError
from dpo_jax.language.data.forms import REVISION
from dpo_jax.lora import LoraConfig
from dpo_jax.optimizers import OptimizerConfig

Config = TypeVar("Config")
CONFIG_FILE = "run.json"
# What may differ when a run is continued: it changes neither the examples of a step nor, up to the rounding of sums on
# another mesh, its numbers.
RESUMABLE = ("output", "log_every", "eval_every", "save_every", "keep", "export", "mesh")


@dataclass(frozen=True)
class ModelConfig:
    """The policy and its reference."""

    model: str = ""
    """Folder of a Hugging Face checkpoint (safetensors), or a hub id."""
    reference_model: str | None = None
    """Folder or hub id of another reference; by default it is the policy at the start."""
    reference: Literal["model", "columns"] = "model"
    """Run the frozen reference in every step, or once before training and keep its log-probs as columns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the model computes in; log-probs and losses are always float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and of the optimizer's moments; adapters are float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What a layer's backward pass computes again to save memory: nothing, all but matrix products, everything."""
    router_loss: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts; 0 leaves it a metric."""


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters instead of the whole model; the frozen base is then the reference and costs no memory."""

    lora_rank: int = 0
    """Rank of the adapters; 0 trains the whole model. Adapters want about ten times its learning rate."""
    lora_alpha: float | None = None
    """Numerator of the adapters' scale; twice the rank by default."""
    lora_targets: str = LoraConfig.targets
    """Regular expression of the path names of the kernels that are adapted; by default all in the layers."""
    rslora: bool = False
    """Divide alpha by the root of the rank instead of the rank (arXiv 2312.03732)."""
    dora: bool = False
    """Learn each output's norm apart from its direction (arXiv 2402.09353)."""
    adapter: str | None = None
    """Folder of an adapter in PEFT's format to go on from; rank, scale and targets are those of the folder."""
    base_quantization: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen kernels in 8 or 4.5 bits an entry (QLoRA, arXiv 2305.14314); adapters are merged into the
    kernels as they were read."""


@dataclass(frozen=True)
class DataConfig:
    """Preference rows and how they become tokens."""

    data: tuple[str, ...] = ()
    """Files of rows: JSONL, JSONL.gz or Parquet."""
    eval_data: tuple[str, ...] = ()
    """Files of rows to evaluate on, instead of a held-out split."""
    held_out: float = 0.05
    """Share of the rows (or, from 1 on, their number) that is held out for evaluation; 0 holds out none."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """Stop at the first bad row, or say how many there are, list them in the run's folder and go on."""
    max_length: int = 1024
    """Most tokens of a prompt together with one completion."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt when something must be cut; half of max_length by default."""
    truncation: Literal["keep_end", "drop"] = "keep_end"
    """Cut what is too long (a prompt keeps its end), or drop the row."""
    layout: Literal["packed", "padded"] = "packed"
    """Rows of prefix trees in which a prompt stands once, or one padded row for each completion."""
    step_delimiter: str | None = None
    """Text that ends a step of an answer, for methods that read steps."""
    revision_instruction: str = REVISION
    """What asks for an improvement of an answer, for methods that learn to revise."""


@dataclass(frozen=True)
class FrozenConfig:
    """Frozen models that make columns of the data before training, each a folder or hub id."""

    guidance_model: str | None = None
    """Model whose token log-probs guide the policy's, with the policy's tokenizer."""
    positive_model: str | None = None
    """Model fine-tuned on right answers, for contrastive token scores."""
    negative_model: str | None = None
    """Model fine-tuned on wrong answers, for contrastive token scores."""
    reward_model: str | None = None
    """Sequence-classification checkpoint with one label, whose rewards are the scores of the completions."""
    embedding_model: str | None = None
    """Model whose mean hidden states are the embeddings of texts and steps."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices."""

    mesh_data: int = -1
    """Size of the data axis; -1 takes the devices that are left."""
    mesh_fsdp: int = 1
    """Size of the axis that shards parameters and batch."""
    mesh_expert: int = 1
    """Size of the axis that shards experts and batch; for mixtures of experts."""
    mesh_model: int = 1
    """Size of the axis that splits heads, hidden units and vocabulary."""
    mesh_slices: int = 1
    """TPU slices (or groups of hosts) that the data axis spans."""
    distributed: bool = False
    """Join the other processes of the run first. Pods, SLURM and Open MPI find each other; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID."""


@dataclass(frozen=True)
class LoopConfig:
    """Course of the run."""

    out: str = ""
    """Folder of the run; the same command continues it."""
    steps: int | None = None
    """Optimizer steps; by default as many as the epochs need."""
    epochs: float = 1.0
    """Passes over the data, where steps are not given."""
    batch_size: int = 16
    """Examples (pairs, lists, ...) in one optimizer step, over all devices."""
    microbatches: int = 1
    """Parts of a batch that are computed one after another to save memory."""
    seed: int = 0
    """Of the order of the data and of everything random."""
    log_every: int = 10
    """Steps between two looks at the device: then a line of metrics is written for every step since."""
    eval_every: int = 100
    """Steps between two evaluations on the held-out rows; 0 only at the end."""
    save_every: int = 100
    """Steps between two checkpoints; 0 only at the end."""
    keep: int = 3
    """Checkpoints that are kept."""
    export: bool = True
    """Write the trained model as a Hugging Face folder OUT/export at the end; adapters are merged into it, and stand
    alone in OUT/adapter in PEFT's format."""
    ema_decay: float | None = None
    """Keep a moving average of the parameters with this decay; it is what is exported."""
    reference_update_every: int = 0
    """Steps between two moves of the reference towards the policy (TR-DPO); 0 leaves it frozen."""
    reference_update_rate: float = 0.6
    """Share of the policy in the moved reference; 1 copies it."""


def train_config_class(chosen: Method) -> type:
    """Dataclass of all options of `dpo-jax train METHOD`."""
    loss = options_class(chosen)
    parts = {
        "model": ModelConfig,
        "adapters": AdapterConfig,
        "data": DataConfig,
        "frozen": FrozenConfig,
        "loss": loss,
        "optimizer": OptimizerConfig,
        "loop": LoopConfig,
        "mesh": MeshConfig,
        "output": OutputConfig,
    }
    fields = [(name, part, field(default_factory=part)) for name, part in parts.items()]
    return make_dataclass("TrainConfig", fields, frozen=True, namespace={"__doc__": f"{chosen.summary}."})


def parse(config_class: type[Config], arguments: list[str], *, prog: str, default: Config | None = None) -> Config:
    """Parse options without prefixes; a wrong one exits with code 2 and says which."""
    return tyro.cli(config_class, args=arguments, prog=prog, default=default, config=(tyro.conf.OmitArgPrefixes,))  # type: ignore[return-value]


def take_config_option(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Take `--config FILE` out of the arguments.

    Raises:
      UsageError: no file follows.
    """
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UsageError("--config needs a file: the run.json of an earlier run")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def config_record(command: str, method: str, config: Any) -> dict[str, Any]:
    """A resolved config as plain JSON values."""
    return {
        "command": command,
        "method": method,
        "version": __version__,
        "config": json.loads(json.dumps(asdict(config))),
    }


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write a resolved config to the run's folder."""
    out.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: other processes read it, and so does the next run after a kill.
    beside = out / f"{CONFIG_FILE}.partial"
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(out / CONFIG_FILE)


def _converter() -> cattrs.Converter:
    """Reads JSON values as they are: cattrs itself makes 3 of 3.7, True of "no" and letters of a text."""
    converter = cattrs.Converter(forbid_extra_keys=True)

    def strict(*accepted: type):
        def hook(value: Any, wanted: type) -> Any:
            if type(value) not in accepted:
                raise ValueError(f"{value!r} is not of type {wanted.__name__}")
            return wanted(value)

        return hook

    for kind, accepted in ((bool, (bool,)), (int, (int,)), (float, (float, int)), (str, (str,))):
        converter.register_structure_hook(kind, strict(*accepted))

    def texts(value: Any, wanted: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{value!r} is not a list of texts")
        return tuple(value)

    converter.register_structure_hook_func(lambda wanted: wanted == tuple[str, ...], texts)
    return converter


def read_config(path: str, config_class: type[Config], *, command: str, method: str) -> Config:
    """Read back what a run wrote.

    Raises:
      UsageError: not such a file, made by another command or method, or a key that is unknown or of a wrong type.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise UsageError(f"--config {path}: expected an object with the key 'config', as a run writes it")
    made_by = (record.get("command"), record.get("method"))
    if made_by != (command, method):
        raise UsageError(f"--config {path} was written by `{made_by[0]} {made_by[1]}`, not by `{command} {method}`")
    try:
        return _converter().structure(record["config"], config_class)
    except cattrs.errors.BaseValidationError as error:
        raise UsageError(f"--config {path}: " + "; ".join(cattrs.transform_error(error))) from error


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the options in which two resolved configs differ, but for those that may."""
    names = []
    for key in sorted(set(old) | set(new)):
        if key in RESUMABLE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key} (was {a}, now {b})")
    return names
