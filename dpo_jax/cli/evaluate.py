"""`dpo-jax evaluate`: how a model ranks pairs, and how far it is from its reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import optax
from jax.sharding import Mesh

from dpo_jax.cli.checks import check_ranges, mesh_of
from dpo_jax.cli.configs import DataConfig, MeshConfig, ModelConfig
from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.data import Wanted, layout_of, read_examples
from dpo_jax.cli.models import open_model
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.language.data.batches import epoch_batches
from dpo_jax.language.data.pack import Layout
from dpo_jax.language.evaluate import likelihood_evaluation, preference_evaluation
from dpo_jax.language.models.decoder import RULES
from dpo_jax.language.objectives import from_loss
from dpo_jax.language.types import Example
from dpo_jax.report import table
from dpo_jax.sharding import data_shards, shard_batch
from dpo_jax.statistics import wilson_interval
from dpo_jax.train import compile_eval_step, evaluate_batches, init_state, make_eval_step
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class EvaluateConfig:
    """Reward accuracy, margin, KL to the reference, log-probs and lengths of a model on pairs."""

    model: str
    """Folder of a Hugging Face checkpoint, a hub id, or the folder of a run (its export)."""
    data: tuple[str, ...]
    """Files of pairs: JSONL, JSONL.gz or Parquet."""
    reference_model: str | None = None
    """The model that it was trained from; without it the reward is the log-probability itself and there is no KL."""
    beta: float = 0.1
    """Scale of the implicit reward; the accuracy does not depend on it."""
    batch_size: int = 16
    """Pairs at a time."""
    max_length: int = 1024
    """Most tokens of a prompt together with one completion."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the models compute in."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def evaluate_command(config: EvaluateConfig) -> None:
    """Evaluate and print.

    Raises:
      UsageError: options without effect, rows that are not pairs, a reference of another shape.
    """
    check_ranges(config)
    if not config.beta > 0:
        raise UsageError(f"--beta is {config.beta}; give a number above 0")
    if config.reference_model is None and config.beta != 0.1:
        raise UsageError("--beta has no effect without --reference-model")
    if config.mesh.distributed:
        join_processes()
    mesh = mesh_of(config.mesh)
    options = ModelConfig(dtype=config.dtype, param_dtype=config.dtype)
    folder = config.model
    if (Path(folder) / "export" / "config.json").exists():
        folder = str(Path(folder) / "export")
        say(f"evaluating {folder}")
    model = open_model(folder, options)
    options_of_data = DataConfig(max_length=config.max_length)
    examples = read_examples(config.data, model.tokenizer, options_of_data, None, Wanted("pairs"))
    plan = layout_of(examples, batch_size=config.batch_size, row_multiple=data_shards(mesh), seed=None, padded=False)
    variables, reference = model.load(mesh), None
    if config.reference_model is not None:
        other = open_model(config.reference_model, options)
        if other.config != model.config:
            raise UsageError(f"{config.reference_model} has another shape or vocabulary than {folder}")
        reference = other.load(mesh)
    values = evaluate_pairs(
        model.apply_fn,
        variables,
        reference,
        examples,
        plan.layout,
        beta=config.beta,
        batch_size=config.batch_size,
        mesh=mesh,
    )
    low, high = wilson_interval(round(values["accuracy"] * values["examples"]), round(values["examples"]))
    values |= {"accuracy_low": low, "accuracy_high": high}
    text = table([(name, f"{value:.4f}") for name, value in sorted(values.items())], ("measure", "value"))
    if not is_first():
        return
    result({"model": folder, "fill_rate": plan.fill_rate, **values}, text, as_json=config.output.json)


def evaluate_pairs(
    apply_fn: Callable[..., Any],
    variables: PyTree,
    reference: PyTree | None,
    examples: Sequence[Example],
    layout: Layout,
    *,
    beta: float,
    batch_size: int,
    mesh: Mesh,
) -> dict[str, float]:
    """Means over pairs of what `language.evaluate` measures, with a reference (which is copied) or without."""
    objective = from_loss(likelihood_evaluation)
    if reference is not None:
        objective = from_loss(preference_evaluation, beta=beta)
    kept = False if reference is None else reference
    state = init_state(variables, optax.identity(), jax.random.key(0), reference=kept)
    step = compile_eval_step(make_eval_step(objective, apply_fn), state, mesh, RULES)
    stream = epoch_batches(examples, layout, batch_size=batch_size, host=jax.process_index(), hosts=jax.process_count())
    return evaluate_batches(step, state, (shard_batch(stream[i], mesh) for i in range(len(stream))))
