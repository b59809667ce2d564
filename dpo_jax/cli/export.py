"""`dpo-jax export RUN`: a checkpoint of a run as a Hugging Face or diffusers folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.cli.adapters import adapted_model, frozen_part, write_model
from dpo_jax.cli.catalogue import Method, method
from dpo_jax.cli.configs import CONFIG_FILE, read_config, train_config_class
from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.images.adapters import adapted_pipeline, write_pipeline
from dpo_jax.cli.images.adapters import frozen_part as image_frozen_part
from dpo_jax.cli.images.configs import image_train_config_class
from dpo_jax.cli.images.models import open_images
from dpo_jax.cli.models import open_model
from dpo_jax.language.models.decoder import RULES
from dpo_jax.sharding import Rules, make_mesh, tree_shardings
from dpo_jax.tree import combine, partition
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class ExportConfig:
    """Write the policy of a run's checkpoint as a Hugging Face or diffusers folder, adapters alone in its `adapter`."""

    run: str
    """Folder of the run (`--out` of train)."""
    out: str
    """Folder to write."""
    step: int | None = None
    """Step of the checkpoint; by default the newest that is whole."""
    weights: Literal["auto", "params", "ema"] = "auto"
    """The parameters, their moving average, or whichever of the two the run exports itself."""
    output: OutputConfig = field(default_factory=OutputConfig)


def export_command(config: ExportConfig) -> None:
    """Read one checkpoint's weights and write them.

    Raises:
      UsageError: no such run, or one without a moving average.
    """
    run = Path(config.run)
    try:
        record = json.loads((run / CONFIG_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{run} is not the folder of a run: {error}") from error
    chosen = method(record["method"])
    config_class = train_config_class(chosen) if chosen.wing == "language" else image_train_config_class(chosen)
    trained = read_config(str(run / CONFIG_FILE), config_class, command="train", method=chosen.slug)
    keeps_average = trained.loop.ema_decay is not None
    if config.weights == "ema" and not keeps_average:
        raise UsageError(f"{run} keeps no moving average; give --weights params")
    name = "ema" if keeps_average and config.weights != "params" else "params"
    model = (_text_model if chosen.wing == "language" else _image_model)(chosen, trained)
    mesh = make_mesh(data=1, fsdp=jax.device_count())
    abstract = partition(model.abstract, model.trainable)[0]
    dtype = {"ema": "float32"}.get(name)
    wanted = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=s),
        abstract,
        tree_shardings(abstract, mesh, model.rules),
    )
    with open_checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({name: wanted}, step=config.step, subset=True)
    for number, reason in restored.damaged:
        say(f"checkpoint of step {number} is damaged and was passed over: {reason}")
    variables = restored.state[name]
    if model.frozen is not None:
        variables = combine(variables, model.frozen(mesh))
    model.write(variables, Path(config.out), Path(config.out) / "adapter")
    values = {"out": config.out, "step": restored.step, "weights": name}
    result(values, f"step {restored.step} ({name}) exported to {config.out}", as_json=config.output.json)


@dataclass(frozen=True)
class _Trained:
    """The model of a run.

    Attributes:
      abstract, trainable, rules: of its variables.
      frozen: reads those that were not trained, or None where all were.
      write: `(variables, folder, folder of the adapter)`.
    """

    abstract: PyTree
    trainable: Callable[[str], bool]
    rules: Rules
    frozen: Callable[[Mesh], PyTree] | None
    write: Callable[[PyTree, Path, Path], None]


def _text_model(chosen: Method, trained: Any) -> _Trained:
    model = open_model(trained.model.model, trained.model, reward=chosen.reward)
    adapted = adapted_model(model, trained.adapters)

    def frozen(mesh: Mesh) -> PyTree:  # adapters are made too, and left aside
        return frozen_part(adapted, adapted.complete(adapted.model.load(mesh), jax.random.key(0)))

    def write(variables: PyTree, folder: Path, adapter: Path) -> None:
        write_model(adapted, variables, folder, adapter, base=trained.model.model)

    kept = None if adapted.rslora is None else frozen
    return _Trained(adapted.abstract, adapted.trainable, RULES, kept, write)


def _image_model(chosen: Method, trained: Any) -> _Trained:
    model = open_images(trained.model.model, trained.model)
    adapted = adapted_pipeline(model, trained.adapters)

    def frozen(mesh: Mesh) -> PyTree:
        return image_frozen_part(adapted, adapted.complete(adapted.model.load(mesh), jax.random.key(0)))

    def write(variables: PyTree, folder: Path, adapter: Path) -> None:
        write_pipeline(adapted, variables, folder, adapter)

    kept = frozen if adapted.holds_frozen else None
    return _Trained(adapted.abstract, adapted.trainable, model.rules, kept, write)
