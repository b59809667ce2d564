"""From a loss of recorded sampling steps to an objective; the names of its arguments say what is computed."""

from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.objectives import Loss, Origin, form_of, of_batch, origin, side_of
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.sampler import guided, logps_of_means, trajectory_means
from dpo_jax.diffusion.types import Predict, Step, TrajectoryBatch
from dpo_jax.signatures import read_needs
from dpo_jax.types import Array, LossOutput, PyTree


def from_step_loss(loss: Loss, process: Process, *, guidance: float = 1.0, shared_state: bool = False, **hyper: Any):
    """Objective `(policy, reference, batch, key, loss_state) -> LossOutput` of a loss of recorded sampling steps.

    Args:
      loss: keyword-only function. `policy_chosen_step_logps` and the like are float32 [B, S], log-probabilities of the
        recorded steps divided by the number of elements; without a side the row has one trajectory. `step_gap` [B, S]
        is the mean squared difference between the steps' means under policy and reference, `step_stds` [B, S] their
        standard deviations; other names are columns.
      process: what the models were trained to undo.
      guidance: scale that the rollouts were made with; other than 1 the batch's condition is a `Guidance`.
      shared_state: the trajectories of a row are single steps from one state (`pools.pair_rows`), at which the models
        are asked once.
      hyper: hyper-parameters of the loss.

    Raises:
      TypeError: a hyper-parameter that the loss does not have; when traced, a column, a reference or a trajectory that
        is missing.
      ValueError: when traced, trajectories of more than one step that are said to share their state.
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
        values = _step_values(makers, policy, reference, batch, process, guidance, shared_state) | of_batch(batch)

        def value(source: Origin) -> Array:
            array = side_of(values, source, form)
            alone = source.side is None and source.statistic in ("step_logps", "step_gap") and array.shape[1] == 1
            return array[:, 0] if alone else array

        arrays = {name: columns[name] if name in columns else value(origins[name]) for name in needs.arrays}
        special = {"loss_state": loss_state} if needs.state else {}
        special |= {"key": key} if needs.key else {}
        return loss(**arrays, **special, **hyper)

    return objective


def _step_values(
    makers: set[str],
    policy: Predict,
    reference: Predict | None,
    batch: TrajectoryBatch,
    process: Process,
    scale: float,
    shared: bool,
) -> dict[tuple[str, str], Array]:
    """[B, K, S] of the trajectories of the rows, [B, S] of the steps."""
    rows, images, states = batch.latents.shape[:3]
    if shared and states != 2:
        raise ValueError(f"trajectories of {states - 1} steps do not share their states; give single steps")
    asked = 1 if shared else images  # trajectories of a row whose states the models see

    def merged(array: Array, count: int) -> Array:
        array = jnp.broadcast_to(array, (rows, images, *array.shape[2:]))[:, :count]
        return array.reshape(rows * count, *array.shape[2:])

    def steps_of(count: int) -> Step:  # [B, S] -> [S, B count]
        return jax.tree.map(lambda table: jnp.repeat(jnp.asarray(table), count, axis=0).T, batch.steps)

    latents = jnp.asarray(batch.latents)
    condition = jax.tree.map(lambda leaf: merged(leaf, asked), batch.condition)
    means: dict[str, Array] = {}
    for maker, model in (("policy", policy), ("reference", reference)):
        if makers & {maker, "both"}:
            assert model is not None
            model = model if scale == 1 else guided(model, scale)
            mean = trajectory_means(
                model, merged(latents, asked), steps_of(asked), condition, parameterisation=process.parameterisation
            )
            means[maker] = jnp.repeat(mean, images // asked, axis=0)  # [N, S, ...]
    if "reference" in means:
        means["reference"] = jax.lax.stop_gradient(means["reference"])
    states_of_all, steps = merged(latents, images), steps_of(images)
    elements = states_of_all[0, 0].size
    values = {
        (maker, "step_logps"): logps_of_means(mean, states_of_all, steps) / elements for maker, mean in means.items()
    }
    if "both" in makers:
        axes = tuple(range(2, means["policy"].ndim))
        values["both", "step_gap"] = jnp.mean(jnp.square(means["policy"] - means["reference"]), axis=axes)
    values = {name: array.reshape(rows, images, -1) for name, array in values.items()}
    std = jnp.zeros_like(batch.steps.time) if batch.steps.std is None else batch.steps.std
    values["steps", "step_stds"] = jnp.asarray(std, jnp.float32)
    return values
