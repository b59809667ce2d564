"""What training of diffusion models refuses before any work is done; what both wings share is in `checks`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from dpo_jax.cli.catalogue import Method, initial_loss_state
from dpo_jax.cli.checks import check_adapter_course, check_course, check_optimizer, check_ranges, option
from dpo_jax.cli.console import UsageError
from dpo_jax.cli.images.configs import ImageAdapterConfig
from dpo_jax.cli.job import hyper_parameters
from dpo_jax.diffusion.data.parsing import ImageRow
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.types import IMAGES, DiffusionBatch, TextCondition
from dpo_jax.rows import RowError
from dpo_jax.types import Array, PyTree


def check_image_options(method: Method, config: Any) -> None:
    """Raise UsageError for what is missing or out of range, and for options that would have no effect."""
    if method.online:
        raise UsageError(
            f"{method.slug} learns from samples of its own policy, which are judged as it goes on: it has no data to "
            f"train on; `{method.module.__name__}` has its parts for a loop of one's own"
        )
    given = (("model", config.model.model), ("data", config.data.data), ("out", config.loop.out))
    if missing := [option(name) for name, value in given if not value]:
        raise UsageError(f"train {method.slug} needs {', '.join(missing)}")
    for part in (config.model, config.adapters, config.data, config.loss, config.loop, config.optimizer):
        check_ranges(part)
    check_optimizer(config.optimizer)
    check_course(config.data, config.loop)
    names = {
        "--reference-model": config.model.reference_model is not None,
        "--reference-update-every": config.loop.reference_update_every > 0,
    }
    if (idle := [name for name, used in names.items() if used]) and not method.reference:
        raise UsageError(f"{', '.join(idle)} has no effect: {method.slug} reads no reference")
    usual, chosen = ImageAdapterConfig(), config.adapters
    changed = [
        option(name)
        for name in ("lora_alpha", "lora_targets", "rslora", "dora")
        if getattr(chosen, name) != getattr(usual, name)
    ]
    if changed and not chosen.lora_rank:
        raise UsageError(f"{', '.join(changed)} has no effect without --lora-rank")
    if not chosen.lora_rank:
        return
    check_adapter_course(config.loop, config.optimizer)
    if config.model.reference_model is not None:
        raise UsageError(
            "--reference-model needs a second frozen base beside that of the adapters; leave it out: the base is then "
            "the reference"
        )


def check_columns(method: Method, rows: Sequence[ImageRow]) -> None:
    """Raise for a column that the method needs and the rows have not (UsageError), or not in one shape (RowError)."""
    first = rows[0]
    if missing := [name for name in method.columns if any(name not in row.columns for row in rows)]:
        raise UsageError(
            f"{method.slug} needs the columns {', '.join(missing)}, and the rows have "
            f"{', '.join(sorted(first.columns)) or 'none'}; give each row a number (or numbers) of that name"
        )
    for name in method.columns:
        shapes = []
        for row in rows:
            try:
                shape = np.shape(row.columns[name])
            except (KeyError, ValueError):
                reason = f"column {name!r} is absent or has lists of several lengths"
                raise RowError(row.file, row.number, reason) from None
            # Lists of images have a number for each, and may differ in length.
            shapes.append(("K", *shape[1:]) if shape[:1] == (len(row.images),) and row.form == "lists" else shape)
            if shapes[-1] != shapes[0]:
                reason = f"column {name!r} has the shape {list(shape)}, but row {first.number} of {first.file} has "
                raise RowError(row.file, row.number, f"{reason}{list(np.shape(first.columns[name]))}")


def check_objective(
    method: Method, config: Any, process: Process, row: ImageRow | None = None, size: tuple[int, int] = (8, 8)
) -> None:
    """Raise UsageError if the loss or what makes its inputs refuses its options, or the columns of the data.

    Both are traced on a row of zeros with a model that stands in for the real one.

    Args:
      process: what the model was trained to undo, which options may not fit.
      row: tells the number of images and frames and the shapes of the columns; needed by a method that reads columns.
      size: height and width of latents, which columns of places in the image must fit.
    """
    images = (len(row.images) // row.frames if row else len(IMAGES[method.form])) or 2
    frames = (row.frames,) if row and row.frames > 1 else ()
    columns = {name: np.zeros((1, *np.shape(row.columns[name])), np.float32) for name in method.columns} if row else {}
    batch = DiffusionBatch(
        latents=np.zeros((1, images, *frames, *size, 4), np.float32),
        condition=TextCondition(np.zeros((1, 1, 1, 1), np.float32)),
        weight=np.ones(1, np.float32),
        columns=columns,
    )
    process = replace(process, empty=TextCondition(np.zeros((1, 1, 1), np.float32)))

    def predict(latents: Array, timesteps: Array, condition: PyTree) -> Array:
        return latents

    state = initial_loss_state(method)
    try:
        objective = from_loss(method.loss, process, inputs=method.inputs, **hyper_parameters(config))
        made = jax.eval_shape(partial(objective, predict, predict), batch, jax.random.key(0), state)
        if made.loss.shape != (1,):
            shapes = ", ".join(f"{name} {list(column.shape[1:])}" for name, column in columns.items())
            raise ValueError(f"columns of the shapes {shapes} give a row {made.loss.size} losses; expected one")
    except (AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"{' '.join([method.slug, *_meant(str(error), method, config)])}: {error}") from error


def _meant(said: str, method: Method, config: Any) -> list[str]:
    """The options that an error is about, as they are typed: those that it names, or else those that were given."""
    values = hyper_parameters(config)
    named = [name for name in values if re.search(rf"\b{name}\b", said)]
    given = [name for name, value in values.items() if value != method.hyper[name]]
    return [f"{option(name)} {values[name]}" for name in named or given]
