"""`dpo-jax export RUN`: a checkpoint of a run as a Hugging Face folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.cli.adapters import adapted_model, frozen_part, write_model
from dpo_jax.cli.catalogue import method
from dpo_jax.cli.configs import CONFIG_FILE, read_config, train_config_class
from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.models import open_model
from dpo_jax.language.models.decoder import RULES
from dpo_jax.sharding import make_mesh, tree_shardings
from dpo_jax.tree import combine, partition


@dataclass(frozen=True)
class ExportConfig:
    """Write the policy of a run's checkpoint as a Hugging Face folder, and adapters alone in its folder `adapter`."""

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
    trained = read_config(str(run / CONFIG_FILE), train_config_class(chosen), command="train", method=chosen.slug)
    keeps_average = trained.loop.ema_decay is not None
    if config.weights == "ema" and not keeps_average:
        raise UsageError(f"{run} keeps no moving average; give --weights params")
    name = "ema" if keeps_average and config.weights != "params" else "params"
    model = open_model(trained.model.model, trained.model, reward=chosen.reward)
    mesh = make_mesh(data=1, fsdp=jax.device_count())
    adapted = adapted_model(model, trained.adapters)
    abstract = partition(adapted.abstract, adapted.trainable)[0]
    dtype = {"ema": "float32"}.get(name)
    wanted = jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=s),
        abstract,
        tree_shardings(abstract, mesh, RULES),
    )
    with open_checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({name: wanted}, step=config.step, subset=True)
    for number, reason in restored.damaged:
        say(f"checkpoint of step {number} is damaged and was passed over: {reason}")
    variables = restored.state[name]
    if adapted.rslora is not None:
        start = adapted.complete(model.load(mesh), jax.random.key(0))  # of which only the frozen part is kept
        variables = combine(variables, frozen_part(adapted, start))
    write_model(adapted, variables, Path(config.out), Path(config.out) / "adapter", base=trained.model.model)
    values = {"out": config.out, "step": restored.step, "weights": name}
    result(values, f"step {restored.step} ({name}) exported to {config.out}", as_json=config.output.json)
