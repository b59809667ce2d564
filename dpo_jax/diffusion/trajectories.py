"""From rollouts to the rows that losses of recorded steps are trained on."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.types import Step, Table, Trajectory, TrajectoryBatch
from dpo_jax.types import Array, PyTree


def trajectory_rows(
    trajectory: Trajectory,
    steps: Step,
    condition: PyTree = None,
    *,
    images: int = 1,
    columns: Mapping[str, Array] | None = None,
    weight: Array | None = None,
) -> TrajectoryBatch:
    """Rows of recorded rollouts, neighbours being trajectories of one row.

    Args:
      trajectory: of N = B * images rollouts.
      steps: the S steps that were recorded, [S], or [S, N] and the same for the trajectories of a row.
      condition: of the rollouts, leaves [N, ...].
      images: trajectories in a row.
      columns: more columns [B, ...]; `old_step_logps` is made, [B, S] or [B, images, S], divided by the elements.
      weight: [B], one for every row by default.
    """
    count, states = trajectory.latents.shape[:2]
    if count % images:
        raise ValueError(f"{count} trajectories are no rows of {images}")
    rows = count // images

    def of_rows(array: Array) -> Array:
        return array.reshape(rows, images, *array.shape[1:])

    def of_steps(table: Array) -> Array:
        table = jnp.asarray(table)
        return jnp.broadcast_to(table, (rows, states - 1)) if table.ndim == 1 else table[:, ::images].T

    logps = trajectory.logps / trajectory.latents[0, 0].size
    return TrajectoryBatch(
        latents=of_rows(trajectory.latents),
        steps=jax.tree.map(of_steps, steps),
        condition=jax.tree.map(of_rows, condition),
        weight=jnp.ones(rows) if weight is None else weight,
        columns={"old_step_logps": logps if images == 1 else of_rows(logps), **(columns or {})},
    )


def single_steps(batch: TrajectoryBatch, *, step_columns: tuple[str, ...] = ("old_step_logps",)) -> TrajectoryBatch:
    """A row for every recorded step, [B S] of them and one step long: methods that update after each step shuffle them.

    Args:
      batch: of S steps.
      step_columns: names of the columns whose last axis is that of the steps; others are a row's.
    """
    rows, _, states = batch.latents.shape[:3]
    count = states - 1

    def of_row(array: Array) -> Array:
        return jnp.repeat(array, count, axis=0)

    def of_step(array: Table) -> Array:  # [B, ..., S] -> [B S, ..., 1]
        array = jnp.moveaxis(jnp.asarray(array), -1, 1)
        return array.reshape(rows * count, *array.shape[2:])[..., None]

    latents = jnp.stack([batch.latents[:, :, :-1], batch.latents[:, :, 1:]], axis=3)  # [B, K, S, 2, ...]
    latents = jnp.moveaxis(latents, 2, 1)
    return replace(
        batch,
        latents=latents.reshape(rows * count, *latents.shape[2:]),
        steps=jax.tree.map(of_step, batch.steps),
        condition=jax.tree.map(of_row, batch.condition),
        weight=of_row(jnp.asarray(batch.weight)),
        columns={
            name: of_step(column) if name in step_columns else of_row(jnp.asarray(column))
            for name, column in batch.columns.items()
        },
    )
