"""Samplers: tables of steps, and one rollout over them with guidance, recording and bounded memory.

A sampler is a function that makes a table (`Step`); the rollout does not know which one it runs:

    ddim_steps, ddpm_steps, flow_sde_steps     stochastic or not, in `transitions`
    euler_steps        arXiv 2206.00364, algorithm 1 without churn, on a schedule's own (also fractional) levels
    dpm_solver_steps   DPM-Solver++(2M), arXiv 2211.01095, algorithm 2
    flow_euler_steps   the straight path's ODE, arXiv 2209.03003

    steps = ddim_steps(schedule, leading_timesteps(50), eta=1.0)
    sample(guided(predict, 7.5), noise, steps, Guidance(prompts, empty), parameterisation=predicts_noise, key=key)

Latents are at the schedule's own scale throughout, alpha * clean + sigma * noise, never at that of alpha = 1.
Rollouts keep float32 latents whatever the model computes in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.draws import split_keys
from dpo_jax.diffusion.schedule import Schedule, denoised, level_tables, per_example
from dpo_jax.diffusion.transitions import (
    draw,
    flow_sde_steps,
    log_prob,
    signal_variances,
    step_table,
    take_steps,
    transition,
)
from dpo_jax.diffusion.types import Denoised, Parameterisation, Predict, Sample, Step, Trajectory, Transition
from dpo_jax.ops import safe_divide
from dpo_jax.types import Array, PyTree


class Guidance(NamedTuple):
    """The conditions of both branches of a guided model, pytrees whose leaves are [B, ...]."""

    positive: PyTree
    negative: PyTree


def euler_steps(schedule: Schedule, timesteps: np.ndarray) -> Step:
    """Euler's method in sigma / alpha, to clean latents; at integer timesteps it is DDIM ending in clean latents.

    Args:
      timesteps: [S], falling in [0, T - 1], integers or fractions, between which sigma / alpha is linear.
    """
    grid, table = np.asarray(timesteps, np.float64), schedule.alphas_cumprod
    if grid.ndim != 1 or not len(grid) or np.any(np.diff(grid) >= 0) or grid[-1] < 0 or grid[0] > len(table) - 1:
        raise ValueError(f"timesteps {grid.tolist()} do not fall within [0, {len(table) - 1}]; sort and clip them")
    with np.errstate(divide="ignore", invalid="ignore"):  # zero terminal SNR: no noise level is above the last one
        ratio = np.interp(grid, np.arange(len(table)), np.sqrt((1 - table) / table))
    whole = grid == np.floor(grid)
    here = np.where(whole, table[grid.astype(np.int64)], 1 / (1 + np.square(ratio)))
    after = np.append(here[1:], 1.0)
    return step_table(grid, level_tables(here), *level_tables(after))


def dpm_solver_steps(schedule: Schedule, timesteps: np.ndarray) -> Step:
    """DPM-Solver++(2M), midpoint form, to clean latents: DDIM plus a share of the change of the clean prediction.

    The first and the last step are of first order, as usual where the last one ends in clean latents.

    Args:
      timesteps: integers [S], falling.
    """
    here, after = signal_variances(schedule, timesteps, 1.0)
    with np.errstate(divide="ignore"):
        # Half the log SNR; -inf at zero terminal SNR makes the step after it one of first order, +inf is clean.
        lower, upper = (0.5 * (np.log(a) - np.log1p(-a)) for a in (here, after))
    span = upper - lower
    weight = np.zeros_like(here)
    inner = slice(1, -1)
    weight[inner] = np.sqrt(after[inner]) * -np.expm1(-span[inner]) * span[inner] / (2 * span[:-2])
    return step_table(np.asarray(timesteps), level_tables(here), *level_tables(after), history=weight)


def flow_euler_steps(sigmas: np.ndarray) -> Step:
    """Euler's method on a straight path's ODE between falling levels [S + 1]; see `schedule.flow_sigmas`."""
    return flow_sde_steps(sigmas, 0.0)


def combine_guidance(positive: Array, negative: Array, scale: Array | float, *, rescale: float = 0.0) -> Array:
    """Guided prediction n + scale (p - n), float32 (arXiv 2207.12598 with scale = 1 + w).

    Args:
      positive, negative: [B, ...] predictions of the two branches, any float dtype.
      scale: 1 is the positive branch, 0 the negative one; a number or [B].
      rescale: share phi in which the result has the positive branch's standard deviation (arXiv 2305.08891).
    """
    positive, negative = positive.astype(jnp.float32), negative.astype(jnp.float32)
    result = negative + per_example(scale, positive) * (positive - negative)
    if not rescale:
        return result
    axes = tuple(range(1, positive.ndim))
    spread = [jnp.std(v, axis=axes, keepdims=True, ddof=1) for v in (positive, result)]
    return rescale * result * safe_divide(*spread) + (1 - rescale) * result


def guided(
    predict: Predict, scale: Array | float, *, negative_predict: Predict | None = None, rescale: float = 0.0
) -> Predict:
    """The classifier-free guided model; its condition is a `Guidance`.

    Args:
      predict: the model, of both branches or of the positive one.
      scale: as in `combine_guidance`; the number 1 leaves the negative branch out.
      negative_predict: another model (other parameters) for the negative branch, arXiv 2505.11245; without it one call
        on twice the batch serves both branches.
      rescale: as in `combine_guidance`.
    """

    def two_networks(latents: Array, timesteps: Array, condition: Guidance) -> Array:
        assert negative_predict is not None
        positive = predict(latents, timesteps, condition.positive)
        return combine_guidance(
            positive, negative_predict(latents, timesteps, condition.negative), scale, rescale=rescale
        )

    def one_network(latents: Array, timesteps: Array, condition: Guidance) -> Array:
        def twice(first: Array, second: Array) -> Array:
            # Each example's branches stay neighbours: concatenated halves would move sharded rows between devices.
            return jnp.stack([first, second], 1).reshape(-1, *first.shape[1:])  # [B, 2, ...] -> [2 B, ...]

        both = predict(twice(latents, latents), twice(timesteps, timesteps), jax.tree.map(twice, *condition))
        both = both.reshape(-1, 2, *both.shape[1:])
        return combine_guidance(both[:, 0], both[:, 1], scale, rescale=rescale)

    def positive_branch(latents: Array, timesteps: Array, condition: Guidance) -> Array:
        return predict(latents, timesteps, condition.positive)

    if isinstance(scale, int | float) and scale == 1:
        return positive_branch
    return one_network if negative_predict is None else two_networks


def sample(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    key: Array | None = None,
    record: tuple[int, int] | None = None,
) -> Sample:
    """Run the steps of a sampler from given latents; differentiable, each step's activations are computed again.

    Args:
      predict: the model, called once per step with float32 latents and timesteps [B].
      latents: [B, ...] at the level of the first step (Gaussian noise at the start of a grid), any float dtype.
      steps: a sampler's table, or a slice of one.
      condition: what the model is conditioned on, leaves [B, ...].
      parameterisation: what the model predicts.
      key: needed by stochastic tables; of the whole rollout, or keys [B] of its examples, whose noise then does not
        depend on the others.
      record: first and last (exclusive) step whose states and log-probabilities are kept; (0, S) keeps all.

    Raises:
      ValueError: no key for a stochastic table; a window outside of the steps; a level at which the prediction does not
        tell the clean latents (predicted noise at zero terminal SNR).
    """
    count = len(steps.time)
    require_clean(steps, parameterisation)
    if steps.std is not None and key is None:
        raise ValueError("the sampler adds noise; give a key, or a deterministic table (eta = 0)")
    first, last = (0, 0) if record is None else record
    if record is not None and not 0 <= first < last <= count:
        raise ValueError(f"record {record} is no window of {count} steps; give 0 <= first < last <= {count}")
    keys = None
    if steps.std is not None and key is not None:
        keys = split_keys(key, count)

    def advance(carry: tuple[Array, Array | None], inputs: tuple[Step, Array | None], *, keep: bool):
        state, previous = carry
        step, step_key = inputs
        said = denoise(predict, state, step, condition, parameterisation)
        given = transition(step, said, previous)
        after = given.mean if step_key is None else draw(given, step_key)
        kept = (after, log_prob(given, after)) if keep else None
        return (after, None if previous is None else said.clean), jax.lax.stop_gradient(kept)

    def run(carry: tuple[Array, Array | None], low: int, high: int, *, keep: bool = False):
        if low == high:
            return carry, None
        body = jax.checkpoint(lambda c, x: advance(c, x, keep=keep), prevent_cse=False)
        window = slice(low, high)
        return jax.lax.scan(body, carry, (take_steps(steps, window), None if keys is None else keys[window]))

    start = latents.astype(jnp.float32)
    before, _ = run((start, None if steps.history is None else jnp.zeros_like(start)), 0, first)
    middle, kept = run(before, first, last, keep=True)
    end, _ = run(middle, last, count)
    if kept is None:
        return Sample(end[0])
    states = jnp.concatenate([jax.lax.stop_gradient(before[0])[None], kept[0]])  # [S + 1, B, ...]
    return Sample(end[0], Trajectory(jnp.moveaxis(states, 0, 1), jnp.moveaxis(kept[1], 0, 1)))


def trajectory_means(
    predict: Predict, latents: Array, steps: Step, condition: PyTree = None, *, parameterisation: Parameterisation
) -> Array:
    """Mean of each recorded step under a model, float32 [B, S, ...].

    One step's activations are alive at a time, backward pass included. No gradient flows into the states.

    Args:
      latents: [B, S + 1, ...] as `Trajectory.latents` holds them.
      steps: the S steps that were recorded, [S] or [S, B].
      condition, parameterisation: as in `sample`.
    """
    if latents.shape[1] != len(steps.time) + 1:
        raise ValueError(f"{latents.shape[1]} states for {len(steps.time)} steps; give one state more than steps")
    require_clean(steps, parameterisation)
    states = jax.lax.stop_gradient(jnp.moveaxis(latents, 1, 0))[:-1].astype(jnp.float32)

    def mean(_: None, inputs: tuple[Step, Array]) -> tuple[None, Array]:
        step, before = inputs
        return None, transition(step, denoise(predict, before, step, condition, parameterisation)).mean

    _, means = jax.lax.scan(jax.checkpoint(mean, prevent_cse=False), None, (steps, states))
    return jnp.moveaxis(means, 0, 1)


def logps_of_means(means: Array, latents: Array, steps: Step) -> Array:
    """Log-probability of recorded steps with given means, float32 [B, S], summed over elements.

    Args:
      means: [B, S, ...], see `trajectory_means`.
      latents, steps: as there.
    """
    after = jax.lax.stop_gradient(latents[:, 1:])
    std = jnp.zeros(len(steps.time), jnp.float32) if steps.std is None else jnp.asarray(steps.std, jnp.float32)
    of_steps = jax.vmap(lambda mean, std, value: log_prob(Transition(mean, std), value), in_axes=(1, 0, 1), out_axes=1)
    return of_steps(means, std, after)


def trajectory_logps(
    predict: Predict, latents: Array, steps: Step, condition: PyTree = None, *, parameterisation: Parameterisation
) -> Array:
    """Log-probability of each recorded step under a model, float32 [B, S], summed over elements.

    Arguments as in `trajectory_means`.
    """
    means = trajectory_means(predict, latents, steps, condition, parameterisation=parameterisation)
    return logps_of_means(means, latents, steps)


def denoise(
    predict: Predict, latents: Array, step: Step, condition: PyTree, parameterisation: Parameterisation
) -> Denoised:
    """What the model says about latents [B, ...] at the level of one step, fields [] or [B]."""
    timesteps = jnp.broadcast_to(jnp.asarray(step.time, jnp.float32), latents.shape[:1])
    return denoised(predict(latents, timesteps, condition), latents, step.level, parameterisation)


def require_clean(steps: Step, parameterisation: Parameterisation) -> None:
    """Raise ValueError if a table on the host has a level at which the prediction does not tell the clean latents."""
    alpha, sigma = steps.level
    if not (isinstance(alpha, np.ndarray) and isinstance(sigma, np.ndarray)):
        return  # traced tables are the caller's care
    a, b = parameterisation(alpha, sigma)
    if np.any((alpha * a - sigma * b == 0) & (sigma != 0)):
        raise ValueError(
            f"{parameterisation.__name__} does not tell the clean latents at alpha = 0 (zero terminal SNR);"
            " use a model that predicts the velocity or the clean latents"
        )
