"""What a model is asked about images, and how wrong its answer is: the one error kernel of all objectives.

N = B * K images, those of a row being neighbours: splitting and merging that axis moves nothing between devices.
A paper that does not simply add noise writes a function that makes the `Inputs`; its argument names say what it needs
(see `objectives.from_loss`).
"""

from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.inversion import fresh_noise, invert
from dpo_jax.diffusion.ops import denoising_error
from dpo_jax.diffusion.process import Process, empty_condition, level_of
from dpo_jax.diffusion.sampler import Guidance, flow_euler_steps, guided
from dpo_jax.diffusion.schedule import (
    add_noise,
    flow_sigmas,
    implied_noise,
    leading_timesteps,
    prediction_target,
)
from dpo_jax.diffusion.transitions import ddim_steps
from dpo_jax.diffusion.types import Predict, Step
from dpo_jax.types import Array, PyTree

# Statistics of a prediction: mean squared error of an image [N], of each frame [N, F] (axis 1), at each place [N, ...]
# (mean over channels), and the prediction itself.
STATISTICS = ("error", "frame_error", "error_map", "pred")


class Inputs(NamedTuple):
    """What a model is asked, and what a perfect one would answer; constants.

    Attributes:
      latents: float32 [N, ...], noisy.
      times: float32 [N], as the model is told them.
      target: float32 [N, ...].
      condition: pytree, leaves [N, ...].
      weights: None, or float32 [S, N] where each image is asked about at S points of a trajectory: latents, times and
        target then lead with S, and an image's error is the weighted sum.
      guidance: scale of classifier-free guidance inside the model; 1 for none.
    """

    latents: Array
    times: Array
    target: Array
    condition: PyTree
    weights: Array | None = None
    guidance: float = 1.0


def noised_inputs(*, clean: Array, noise: Array, times: Array, condition: PyTree, process: Process) -> Inputs:
    """Noise added to clean latents, which is what most papers do.

    Args:
      clean, noise: [N, ...].
      times: float32 [N].
      condition: leaves [N, ...].
    """
    level = level_of(process, times)
    target = prediction_target(clean, noise, level, process.parameterisation)
    return Inputs(add_noise(clean, noise, level), times, target, condition)


def inversion_steps(process: Process, steps: int, *, offset: int = 1) -> Step:
    """The deterministic sampler's table that inversion papers walk backwards: DDIM on the leading grid, or Euler's.

    Args:
      steps: number of model calls, at most the schedule's timesteps.
      offset: of the grid on a schedule; the published loops of InPO and SmPO take 1, Inversion-DPO's 0.
    """
    if process.schedule is None:
        return flow_euler_steps(flow_sigmas(steps, shift=process.shift, lowest=1 / steps))
    count = process.schedule.timesteps
    return ddim_steps(process.schedule, leading_timesteps(steps, timesteps=count, steps_offset=offset))


def inverted_inputs(
    predict: Predict,
    *,
    clean: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    steps: int,
    weights: tuple[float, ...] | np.ndarray = (1.0,),
    eta: float = 0.0,
    key: Array | None = None,
    snap: bool = True,
) -> Inputs:
    """Clean latents inverted up to their timesteps, and the noise that they then stand for.

    The grid is coarse, so an image stops at its last level below its timestep. An image whose timestep is below the
    grid's first level is not moved.

    Args:
      predict: the model that inverts, unguided.
      clean, times, condition: as in `noised_inputs`.
      steps: of the whole grid.
      weights: of the predictions of each step, see `inversion.invert`.
      eta: share of fresh noise after each step (`inversion.fresh_noise`); needs a key and a schedule.
      snap: tell the models the level that was reached, and take the noise at it; else those of the drawn timestep.

    Raises:
      ValueError: fresh noise on straight paths.
    """
    table, std = inversion_steps(process, steps), None
    if eta:
        if process.schedule is None:
            raise ValueError(f"eta is {eta}, and straight paths have no posterior to take fresh noise from; give 0")
        std = fresh_noise(process.schedule, np.asarray(table.time, np.int64), eta=eta)
    found = invert(
        predict,
        clean,
        table,
        condition,
        parameterisation=process.parameterisation,
        weights=weights,
        until=times,
        std=std,
        key=key,
    )
    latents, told = jax.lax.stop_gradient((found.latents, found.timesteps if snap else times))
    level = level_of(process, told)
    noise = implied_noise(latents, clean.astype(jnp.float32), level)
    return Inputs(latents, told, prediction_target(clean, noise, level, process.parameterisation), condition)


def measure(predict: Predict, inputs: Inputs, process: Process, statistics: Collection[str]) -> dict[str, Array]:
    """Statistics of a model's predictions, float32, differentiable in what the model closes over.

    One point of a trajectory is alive at a time, backward pass included.

    Args:
      predict: the model.
      inputs: constants; no gradient flows into them.
      process: gives the empty prompt's condition where the inputs ask for guidance.
      statistics: names in STATISTICS; of trajectories "error" alone.

    Raises:
      ValueError: a statistic that is not there, or not of trajectories.
    """
    inputs = jax.lax.stop_gradient(inputs._replace(guidance=0.0))._replace(guidance=inputs.guidance)
    condition = inputs.condition
    if inputs.guidance != 1.0:
        away = empty_condition(process, condition)
        predict, condition = guided(predict, inputs.guidance), Guidance(condition, away)
    if unknown := set(statistics) - set(STATISTICS if inputs.weights is None else ("error",)):
        kind = "an image" if inputs.weights is None else "a trajectory"
        raise ValueError(f"no statistics {sorted(unknown)} of {kind}; there are {', '.join(STATISTICS)}")
    if inputs.weights is not None:
        ask = jax.checkpoint(partial(_step_error, predict, condition), prevent_cse=False)
        start = jnp.zeros(inputs.times.shape[1:], jnp.float32)
        points = (inputs.latents, inputs.times, inputs.target, inputs.weights)
        return {"error": jax.lax.scan(ask, start, points)[0]}
    said = predict(inputs.latents, inputs.times, condition).astype(jnp.float32)
    last = said.ndim - 1
    makers = {
        "error": lambda: denoising_error(said, inputs.target),
        "frame_error": lambda: denoising_error(said, inputs.target, keep=(1,)),
        "error_map": lambda: denoising_error(said, inputs.target, keep=tuple(range(1, last))),
        "pred": lambda: said,
    }
    return {name: makers[name]() for name in statistics}


def _step_error(
    predict: Predict, condition: PyTree, total: Array, point: tuple[Array, Array, Array, Array]
) -> tuple[Array, None]:
    latents, times, target, weight = point
    return total + weight * denoising_error(predict(latents, times, condition), target), None
