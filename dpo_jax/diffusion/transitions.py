"""One Gaussian transition for every stochastic sampler: DDIM with eta, DDPM, and the SDE of flow models.

All of them step to  c * x0 + n * eps + std * z  with what the model says about clean latents x0 and noise eps:

    DDIM, eta (arXiv 2010.02502, eq. 12, 16)   c = alpha',   n = sqrt(sigma'^2 - std^2),
                                               std = eta (sigma' / sigma) sqrt(1 - alpha^2 / alpha'^2)
    flow SDE, noise scale k (arXiv 2505.05470) c = 1 - s',   n = s' - k^2 (s - s') / (2 s),   std = k sqrt(s - s')

The second is the usual mean x (1 + k^2 dt / (2 s)) + v (1 + k^2 (1 - s) / (2 s)) dt, dt = s' - s, with x and v written
in x0 and eps. The weights are tables made in float64 on the host; a row of them is a step, so a trainer that draws a
step per example takes rows: `take_steps(steps, indices [B])`.
Log-probabilities are sums over all axes but the batch; methods that want means divide by the number of elements.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.draws import normal
from dpo_jax.diffusion.schedule import Schedule, level_tables, per_example
from dpo_jax.diffusion.types import Denoised, Level, Step, Table, Transition
from dpo_jax.ops import require_between
from dpo_jax.types import Array

FLOW_TIME = 1000.0  # flow models are given 1000 sigma as their timestep


def ddim_steps(
    schedule: Schedule, timesteps: np.ndarray, *, eta: float = 0.0, last_alpha_cumprod: float | None = None
) -> Step:
    """DDIM from each timestep to the next one of the grid; eta = 0 is deterministic, eta = 1 is DDPM's posterior.

    Args:
      timesteps: integers [S], falling, or [S, B] for a grid of each example's own.
      eta: share of the posterior's standard deviation, in [0, 1].
      last_alpha_cumprod: signal variance after the last step: that of timestep 0 if not given (Stable Diffusion), 1 for
        clean latents.
    """
    require_between(0.0, 1.0, eta=eta)
    here, after = signal_variances(schedule, timesteps, last_alpha_cumprod)
    variance = eta**2 * posterior_variance(here, after)
    return _vp_steps(timesteps, here, after, variance, np.sqrt(variance) if eta else None)


def ddpm_steps(
    schedule: Schedule,
    timesteps: np.ndarray,
    *,
    variance: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Step:
    """DDPM's ancestral sampler, arXiv 2006.11239, to clean latents; no noise is added at timestep 0.

    Args:
      timesteps: integers [S], falling, or [S, B].
      variance: `posterior_variance` if not given ("fixed small"), or `forward_variance` ("fixed large"); the mean is
        that of the posterior either way.
    """
    here, after = signal_variances(schedule, timesteps, 1.0)
    posterior = posterior_variance(here, after)
    added = posterior if variance is None else variance(here, after)
    std = np.where(np.asarray(timesteps) == 0, 0.0, np.sqrt(added))
    return _vp_steps(timesteps, here, after, posterior, std)


def posterior_variance(here: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Variance of the posterior of a step between two signal variances, here below after."""
    return (1 - after) / (1 - here) * forward_variance(here, after)


def forward_variance(here: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Variance of the noising step that is undone, 1 - abar / abar'."""
    return 1 - here / after


def flow_sde_steps(sigmas: np.ndarray, noise_scales: np.ndarray | float) -> Step:
    """Steps of a flow model's SDE: the marginals of the ODE at any noise scale, arXiv 2505.05470.

    Args:
      sigmas: levels [S + 1], falling, from at most 1 to at least 0.
      noise_scales: k of each step, [S] or one number (arXiv 2505.07818 takes a constant 0.3); zero is an Euler step,
        and zero everywhere a deterministic table.
        See `flow_noise_scales`.
    """
    here, after = _flow_levels(sigmas)
    scales = np.broadcast_to(np.asarray(noise_scales, np.float64), here.shape)
    noise = after - scales**2 * (here - after) / (2 * here)
    std = scales * np.sqrt(here - after) if scales.any() else None
    return step_table(FLOW_TIME * here, Level(1 - here, here), 1 - after, noise, std)


def flow_noise_scales(sigmas: np.ndarray, *, level: float = 0.7) -> np.ndarray:
    """Noise scales [S] level * sqrt(s / (1 - s)) of Flow-GRPO; at s = 1 the next level stands in the denominator."""
    here, after = _flow_levels(sigmas)
    return level * np.sqrt(here / (1 - np.where(here == 1, after, here)))


def step_table(
    time: Table,
    level: Level,
    clean: Table,
    noise: Table,
    std: Table | None = None,
    history: Table | None = None,
) -> Step:
    """A sampler's table in float32 from the fields of `Step`, each [S] or [S, B]."""

    def float32(table: Table) -> np.ndarray:
        return np.asarray(table, np.float32)

    return Step(
        time=float32(time),
        alpha=float32(level.alpha),
        sigma=float32(level.sigma),
        clean=float32(clean),
        noise=float32(noise),
        std=None if std is None else float32(std),
        history=None if history is None else float32(history),
    )


def take_steps(steps: Step, index: Table | int | slice) -> Step:
    """Rows of a table of steps: a slice of it, one step (an integer), or one for each example (integers [B])."""
    return jax.tree.map(lambda table: (table if isinstance(index, slice) else jnp.asarray(table))[index], steps)


def transition(step: Step, said: Denoised, previous_clean: Array | None = None) -> Transition:
    """The Gaussian of one step.

    Args:
      step: fields [] or [B].
      said: what the model says at the step's level, fields [B, ...].
      previous_clean: what it said about the clean latents one step before; read by steps with a history.
    """
    mean = per_example(step.clean, said.clean) * said.clean + per_example(step.noise, said.noise) * said.noise
    if step.history is not None and previous_clean is not None:
        mean = mean + per_example(step.history, mean) * (said.clean - previous_clean)
    return Transition(mean, jnp.float32(0.0) if step.std is None else jnp.asarray(step.std, jnp.float32))


def draw(given: Transition, key: Array) -> Array:
    """A sample of the transition, float32 [B, ...], differentiable in mean and standard deviation.

    Args:
      key: of the batch, or keys [B] of its examples.
    """
    return given.mean + per_example(given.std, given.mean) * normal(key, given.mean.shape)


def log_prob(given: Transition, value: Array) -> Array:
    """Log-probability of the state after the step, float32 [B], summed over all other axes.

    A step without noise has no density: it is zero there, with zero gradient, and drops out of sums and of ratios.

    Args:
      given: mean [B, ...], std [] or [B].
      value: [B, ...], any float dtype.
    """
    std = per_example(given.std, given.mean)
    certain = std == 0
    std = jnp.where(certain, 1.0, std)
    z = (value.astype(jnp.float32) - given.mean) / std
    density = -0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return jnp.sum(jnp.where(certain, 0.0, density), axis=tuple(range(1, value.ndim)))


def signal_variances(schedule: Schedule, timesteps: np.ndarray, last: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Signal variances before and after each step of a grid, float64 of the grid's shape."""
    grid, table = np.asarray(timesteps), schedule.alphas_cumprod
    if not np.issubdtype(grid.dtype, np.integer) or grid.ndim not in (1, 2) or not len(grid):
        raise ValueError(f"timesteps of shape {grid.shape} and type {grid.dtype}; give integers [S] or [S, B]")
    if np.any(np.diff(grid, axis=0) >= 0) or grid.min() < 0 or grid.max() >= schedule.timesteps:
        raise ValueError(f"timesteps {grid.tolist()} do not fall within [0, {schedule.timesteps}); sort and clip them")
    last = table[0] if last is None else last
    after = np.concatenate([table[grid[1:]], np.full_like(table[grid[:1]], last)])
    if np.any(after < table[grid]):
        raise ValueError(
            f"signal variance {last:g} after the last step is below that of its timestep; give a larger one"
        )
    return table[grid], after


def _vp_steps(
    timesteps: np.ndarray, here: np.ndarray, after: np.ndarray, variance: np.ndarray, std: np.ndarray | None
) -> Step:
    noise = np.sqrt(np.maximum(1 - after - variance, 0.0))
    return step_table(np.asarray(timesteps), level_tables(here), np.sqrt(after), noise, std)


def _flow_levels(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sigmas = np.asarray(sigmas, np.float64)
    if len(sigmas) < 2 or np.any(np.diff(sigmas, axis=0) >= 0) or sigmas.max() > 1 or sigmas.min() < 0:
        raise ValueError(f"flow levels {sigmas.tolist()} do not fall within [0, 1]; see flow_sigmas")
    return sigmas[:-1], sigmas[1:]
