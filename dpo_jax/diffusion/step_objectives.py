"""From a loss of recorded sampling steps to an objective; the names of its arguments say what is computed."""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.objectives import Loss, form_of, of_batch, origin, side_of
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.sampler import guided, logps_of_means, trajectory_means
from dpo_jax.diffusion.types import Predict, TrajectoryBatch
from dpo_jax.signatures import read_needs
from dpo_jax.types import Array, LossOutput, PyTree


def from_step_loss(loss: Loss, process: Process, *, guidance: float = 1.0, **hyper: Any):
    """Objective `(policy, reference, batch, key, loss_state) -> LossOutput` of a loss of recorded sampling steps.

    Args:
      loss: keyword-only function. `policy_chosen_step_logps` and the like are float32 [B, S], log-probabilities of the
        recorded steps divided by the number of elements; without a side the row has one trajectory. `step_gap` [B, S]
        is the mean squared difference between the steps' means under policy and reference, `step_stds` [B, S] their
        standard deviations; other names are columns.
      process: what the models were trained to undo.
      guidance: scale that the rollouts were made with; other than 1 the batch's condition is a `Guidance`.
      hyper: hyper-parameters of the loss.

    Raises:
      TypeError: a hyper-parameter that the loss does not have; when traced, a column, a reference or a trajectory that
        is missing.
    """
    needs, form = read_needs(loss), form_of(loss)
    if unknown := set(hyper) - set(needs.hyper):
        raise TypeError(f"{loss.__name__} has no option {sorted(unknown)}; its options are {sorted(needs.hyper)}")

    def objective(
        policy: Predict, reference: Predict | None, batch: TrajectoryBatch, key: Array, loss_state: PyTree = None
    ) -> LossOutput:
        columns = {name: jnp.asarray(x) for name, x in batch.columns.items()}
        origins = {name: origin(name) for name in needs.arrays if name not in columns}
        if missing := sorted(name for name, source in origins.items() if source.maker == "column"):
            raise TypeError(f"{loss.__name__} needs the columns {missing}, and the data has {sorted(columns)}")
        makers = {source.maker for source in origins.values()}
        if reference is None and makers & {"reference", "both"}:
            raise TypeError(f"{loss.__name__} needs a reference: give the state one")
        values = _step_values(makers, policy, reference, batch, process, guidance) | of_batch(batch)
        arrays = {
            name: columns[name] if name in columns else side_of(values, origins[name], form) for name in needs.arrays
        }
        special = {"loss_state": loss_state} if needs.state else {}
        special |= {"key": key} if needs.key else {}
        return loss(**arrays, **special, **hyper)

    return objective


def _step_values(
    makers: set[str], policy: Predict, reference: Predict | None, batch: TrajectoryBatch, process: Process, scale: float
) -> dict[tuple[str, str], Array]:
    """[B, K, S] of each trajectory of the rows, or [B, S] where rows have one."""
    rows, images = batch.latents.shape[:2]
    latents = jnp.asarray(batch.latents).reshape(rows * images, *batch.latents.shape[2:])

    def merged(array: Array) -> Array:
        array = jnp.broadcast_to(array, (rows, images, *array.shape[2:]))
        return array.reshape(rows * images, *array.shape[2:])

    def split(array: Array) -> Array:
        return array if images == 1 else array.reshape(rows, images, *array.shape[1:])

    condition = jax.tree.map(merged, batch.condition)
    steps = jax.tree.map(lambda table: jnp.repeat(table, images, axis=0).T, batch.steps)  # [B, S] -> [S, N]
    means: dict[str, Array] = {}
    for maker, model in (("policy", policy), ("reference", reference)):
        if makers & {maker, "both"}:
            assert model is not None
            model = model if scale == 1 else guided(model, scale)
            means[maker] = trajectory_means(model, latents, steps, condition, parameterisation=process.parameterisation)
    if "reference" in means:
        means["reference"] = jax.lax.stop_gradient(means["reference"])
    elements = latents[0, 0].size
    values = {
        (maker, "step_logps"): split(logps_of_means(mean, latents, steps) / elements) for maker, mean in means.items()
    }
    if "both" in makers:
        axes = tuple(range(2, means["policy"].ndim))
        values["both", "step_gap"] = split(jnp.mean(jnp.square(means["policy"] - means["reference"]), axis=axes))
    std = jnp.zeros_like(batch.steps.time) if batch.steps.std is None else batch.steps.std
    values["steps", "step_stds"] = jnp.asarray(std, jnp.float32)
    return values
