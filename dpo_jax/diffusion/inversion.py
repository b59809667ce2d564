"""Inversion: from clean latents to the noisy latents that deterministic sampling brings back to them.

A sampler's step takes y at (alpha, sigma) to z = c * x0(p, y) + n * eps(p, y), linear in y and in the prediction p of
the model at y. Solved for y, with the coefficients a, b of what the model predicts,

    y = F(z, p) = ((alpha a - sigma b) z - (n alpha - c sigma) p) / (c a - n b),   p = model(y, t)

For predicted noise that is sqrt(abar / abar') z + (...) eps, for a straight path z + (s - s') v. DDIM inversion
(arXiv 2010.02502) takes p at z; fixed-point iteration evaluates p again at the newest y, always moving from z; ReNoise
(arXiv 2403.14602) averages some of these predictions. All three are one loop over p_i = model(y_i, t),
y_{i+1} = F(z, p_i), y_0 = z, with the result F(z, sum_i w_i p_i):

    plain         w = (1,)                            one model call per step
    fixed point   w = (0, ..., 0, 1)                  `fixed_point(calls)`
    averaged      w = 1 / (high - low) on a range     `averaged(low, high)`; SmPO's step is averaged(0, 2)

The model is called at the destination's timestep and level, also for the first estimate. The loop contracts if
|n alpha - c sigma| / (c a - n b) times the model's Lipschitz constant is below 1: large jumps and strong guidance may
break that. The table is the sampler's own, so what is inverted is exactly what `sample` does with it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.draws import normal, split_keys
from dpo_jax.diffusion.schedule import Schedule, per_example
from dpo_jax.diffusion.transitions import posterior_variance
from dpo_jax.diffusion.types import Parameterisation, Predict, Step, Table
from dpo_jax.types import Array, PyTree


class Inversion(NamedTuple):
    """What an inversion returns; a step that an example does not take leaves its latents as they are.

    Attributes:
      latents: float32 [B, ...].
      timesteps: float32 [B], the last timestep that each example reached: the level of its latents. It is 0 for
        examples that took no step and are what they were.
      states: float32 [B, S + 1, ...], from the given latents to the last ones, or None.
      predictions: float32 [B, S, ...], the weighted prediction of each step, or None.
    """

    latents: Array
    timesteps: Array
    states: Array | None = None
    predictions: Array | None = None


def fixed_point(calls: int) -> np.ndarray:
    """Weights [calls] that take the last prediction: calls - 1 refinements of DDIM inversion."""
    return averaged(calls - 1, calls)


def averaged(low: int, high: int, calls: int | None = None) -> np.ndarray:
    """Weights [calls] (`high` if not given) that average the predictions low to high (exclusive)."""
    calls = high if calls is None else calls
    if not 0 <= low < high <= calls:
        raise ValueError(f"no predictions {low} to {high} (exclusive) in {calls} calls; give 0 <= low < high <= calls")
    index = np.arange(calls)
    return np.where((index >= low) & (index < high), 1.0 / (high - low), 0.0).astype(np.float32)


def fresh_noise(schedule: Schedule, timesteps: np.ndarray, *, eta: float = 0.1) -> np.ndarray:
    """Standard deviations [S] of noise that DDIM-InPO adds after each step, arXiv 2503.18454.

    eta times that of DDPM's posterior from one stride of the grid above, or from the table's end if that is nearer.

    Args:
      timesteps: the sampler's falling grid [S], evenly spaced.
    """
    grid, table = np.asarray(timesteps), schedule.alphas_cumprod
    stride = grid[0] - grid[1] if len(grid) > 1 else len(table)
    above = table[np.minimum(grid + stride, len(table) - 1)]
    return (eta * np.sqrt(posterior_variance(above, table[grid]))).astype(np.float32)


def invert(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    weights: Table | tuple[float, ...] = (1.0,),
    until: Array | None = None,
    std: Table | None = None,
    key: Array | None = None,
    record: bool = False,
) -> Inversion:
    """Run a deterministic sampler's steps backwards, from its last to its first.

    Gradients flow through it, each step's activations being computed again; methods stop them where their papers do.

    Args:
      predict: the model, guided or not (`sampler.guided`); published recipes guide with a scale of 0, 1 or 2.
      latents: [B, ...] clean latents, any float dtype.
      steps: a deterministic table in the order of the sampler, falling timesteps, without history.
      condition, parameterisation: as in `sampler.sample`.
      weights: [C] of the C predictions made at each step, sum 1, or [S, C] in the order of the table, as in
        np.where(steps.time[:, None] < 250, averaged(0, 5, 10), averaged(8, 10)).
      until: [B]; an example takes the steps to timesteps below it. All of them if not given.
      std: [S] of noise to add after each step, in the order of the table (`fresh_noise`); needs a key.
      key: of the batch, or keys [B] of its examples.
      record: keep states and predictions.

    Raises:
      ValueError: a stochastic table or one with history; weights of a wrong shape; noise without a key; a step that
        cannot be undone (a model that predicts clean latents, a sampler that ends in them).
    """
    calls = _weight_rows(weights, steps)
    _require_invertible(steps, parameterisation)
    if std is not None and key is None:
        raise ValueError("noise is added after each step; give a key, or no std")
    count, state = len(steps.time), latents.astype(jnp.float32)
    keys = None if std is None or key is None else split_keys(key, count)
    limits = None if until is None else jnp.asarray(until, jnp.float32)

    def advance(state: Array, inputs: tuple[Step, Array, Array | None, Array | None]):
        step, row, deviation, step_key = inputs
        times = jnp.broadcast_to(jnp.asarray(step.time, jnp.float32), state.shape[:1])

        def refine(carry: tuple[Array, Array], weight: Array):
            guess, total = carry
            said = predict(guess, times, condition).astype(jnp.float32)
            return (undo_step(state, said, step, parameterisation), total + weight * said), None

        (_, said), _ = jax.lax.scan(refine, (state, jnp.zeros_like(state)), row)
        after = undo_step(state, said, step, parameterisation)
        if deviation is not None and step_key is not None:
            after = after + per_example(deviation, after) * normal(step_key, after.shape)
        if limits is not None:
            after = jnp.where(per_example(times < limits, after) > 0, after, state)
        return after, (after, said) if record else None

    inputs = jax.tree.map(lambda table: table[::-1], (steps, calls, std))
    end, kept = jax.lax.scan(jax.checkpoint(advance, prevent_cse=False), state, (*inputs, keys))
    reached = jnp.broadcast_to(jnp.asarray(steps.time, jnp.float32).T, (state.shape[0], count))  # [S] or [S, B]
    if limits is not None:
        reached = jnp.where(reached < limits[:, None], reached, 0.0)
    reached = jnp.max(reached, axis=1)
    if kept is None:
        return Inversion(end, reached)
    states = jnp.concatenate([state[None], kept[0]])  # [S + 1, B, ...]
    return Inversion(end, reached, jnp.moveaxis(states, 0, 1), jnp.moveaxis(kept[1], 0, 1))


def undo_step(after: Array, prediction: Array, step: Step, parameterisation: Parameterisation) -> Array:
    """The latents from which a deterministic step leads to given ones if the model predicts this there, float32.

    Args:
      after, prediction: [B, ...]; the prediction belongs to the latents before the sampler's step.
      step: one step of the sampler, fields [] or [B].
    """
    after, prediction = after.astype(jnp.float32), prediction.astype(jnp.float32)
    alpha, sigma, clean, noise = (per_example(v, after) for v in (step.alpha, step.sigma, step.clean, step.noise))
    a, b = parameterisation(alpha, sigma)
    return ((alpha * a - sigma * b) * after - (noise * alpha - clean * sigma) * prediction) / (clean * a - noise * b)


def _weight_rows(weights: Table | tuple[float, ...], steps: Step) -> Array:
    """Weights of predictions for every step, float32 [S, C]."""
    count, table = len(steps.time), jnp.asarray(weights, jnp.float32)
    if table.ndim not in (1, 2) or not table.shape[-1] or (table.ndim == 2 and len(table) != count):
        raise ValueError(f"weights of shape {table.shape} for {count} steps; give [calls] or [{count}, calls]")
    if not isinstance(weights, jax.Array) and not np.allclose(np.sum(weights, axis=-1), 1.0, atol=1e-5):
        raise ValueError(f"weights {np.asarray(weights).tolist()} do not sum to 1 in each step; see averaged")
    return jnp.broadcast_to(table, (count, table.shape[-1]))


def _require_invertible(steps: Step, parameterisation: Parameterisation) -> None:
    if steps.std is not None or steps.history is not None:
        raise ValueError("only deterministic one-step samplers are inverted; give ddim_steps with eta 0 or euler_steps")
    if not isinstance(steps.alpha, np.ndarray) or not isinstance(steps.sigma, np.ndarray):
        return  # traced tables are the caller's care
    a, b = parameterisation(steps.alpha, steps.sigma)
    if np.any(steps.clean * a - steps.noise * b == 0):
        raise ValueError(
            f"{parameterisation.__name__}: a step that ends at sigma = 0 forgets where it came from; let the sampler"
            " end at timestep 0 (ddim_steps' default)"
        )
