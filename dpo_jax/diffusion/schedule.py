"""Noise schedules, timestep grids, noise levels, and the conversions between what diffusion models predict.

Latents at a level are x = alpha * clean + sigma * noise. Variance-preserving schedules (DDPM, arXiv 2006.11239) have
alpha^2 + sigma^2 = 1 and a table over integer timesteps; straight paths (rectified flow, arXiv 2209.03003) have
alpha = 1 - sigma and no table. A model predicts a * noise + b * clean:

    predicts_noise     a = 1,      b = 0         DDPM
    predicts_clean     a = 0,      b = 1
    predicts_velocity  a = alpha,  b = -sigma    arXiv 2202.00512
    predicts_flow      a = 1,      b = -1        arXiv 2209.03003

so with x the clean part and the noise follow from two linear equations, and every parameterisation is one line here.
Tables are float64 on the host, float32 on the device. A rule for arrays: [B] values go with latents [B, ...].
"""

from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.draws import normal
from dpo_jax.diffusion.types import Denoised, Level, Parameterisation, Table
from dpo_jax.ops import require_positive
from dpo_jax.types import Array

Sigmas = TypeVar("Sigmas", float, np.ndarray, Array)
# Floor of alpha and sigma in ratios of their squares, which must stay above the smallest float32.
SMALLEST = 1e-15


@dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule. Hashed by identity: a closure or a static argument of jit, never a traced one.

    Attributes:
      alphas_cumprod: float64 [T] on the host, share of the signal's variance at each timestep, falling.
    """

    alphas_cumprod: np.ndarray

    def __post_init__(self):
        table = self.alphas_cumprod
        if table.ndim != 1 or not (np.all(table >= 0) and np.all(table < 1) and np.all(np.diff(table) < 0)):
            raise ValueError(
                f"alphas_cumprod of shape {table.shape} in [{table.min():g}, {table.max():g}] is no schedule;"
                " give falling values in [0, 1)"
            )

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps the model was trained with."""
        return len(self.alphas_cumprod)


def schedule_of_betas(betas: np.ndarray) -> Schedule:
    """The schedule with the given variances [T] of single noising steps."""
    return Schedule(np.cumprod(1.0 - np.asarray(betas, np.float64)))


def linear_schedule(timesteps: int = 1000, *, start: float = 1e-4, end: float = 0.02) -> Schedule:
    """Variances of single steps on a line (DDPM)."""
    return schedule_of_betas(np.linspace(start, end, timesteps))


def scaled_linear_schedule(timesteps: int = 1000, *, start: float = 0.00085, end: float = 0.012) -> Schedule:
    """Square roots of the variances on a line (latent diffusion; the defaults are those of Stable Diffusion)."""
    return schedule_of_betas(np.linspace(start**0.5, end**0.5, timesteps) ** 2)


def cosine_schedule(timesteps: int = 1000, *, largest_beta: float = 0.999) -> Schedule:
    """Signal variance as a squared cosine, arXiv 2102.09672, with the last variances clipped."""
    share = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return schedule_of_betas(np.minimum(1.0 - share[1:] / share[:-1], largest_beta))


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule stretched so that the last timestep is pure noise and the first is unchanged, arXiv 2305.08891.

    The clean part cannot be told from predicted noise there: such models predict the velocity or the clean latents.
    """
    root = np.sqrt(schedule.alphas_cumprod)
    return Schedule(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)


def leading_timesteps(steps: int, *, timesteps: int = 1000, steps_offset: int = 1) -> np.ndarray:
    """Falling grid [steps] of multiples of timesteps // steps, shifted up; the top of the schedule is left out.

    DPM-Solver's grid in common code is the grid of steps + 1 less its last entry, leading and linspace alike.
    """
    _require_steps(steps, timesteps)
    grid = np.arange(steps)[::-1] * (timesteps // steps) + steps_offset
    if steps_offset < 0 or grid[0] >= timesteps:
        raise ValueError(f"steps_offset {steps_offset} moves the grid out of [0, {timesteps}); give a smaller one")
    return grid


def trailing_timesteps(steps: int, *, timesteps: int = 1000) -> np.ndarray:
    """Falling grid [steps] from timesteps - 1, as zero terminal SNR needs (arXiv 2305.08891, table 2)."""
    _require_steps(steps, timesteps)
    return np.round(timesteps - np.arange(steps) * (timesteps / steps)).astype(np.int64) - 1


def linspace_timesteps(steps: int, *, timesteps: int = 1000) -> np.ndarray:
    """Falling grid [steps] from timesteps - 1 to 0 inclusive, rounded."""
    _require_steps(steps, timesteps)
    return np.round(np.linspace(0, timesteps - 1, steps)).astype(np.int64)[::-1]


def shift_sigmas(sigmas: Sigmas, shift: float) -> Sigmas:
    """Flow levels moved towards noise: a s / (1 + (a - 1) s), which keeps 0 and 1 (arXiv 2403.03206, section 5.3.2)."""
    require_positive(shift=shift)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(steps: int, *, shift: float = 3.0, lowest: float | None = None) -> np.ndarray:
    """Falling flow levels float64 [steps + 1] from 1 to 0.

    Args:
      steps: number of model calls, at least 1.
      shift: static shift; 3 is Stable Diffusion 3's. A dynamic one is exp(mu), see `image_shift`.
      lowest: the last level above zero before the shift; by default shift_sigmas(1/1000, shift), which common code
        arrives at by shifting its own table's end twice. 1/1000 shifts once; with dynamic shifts 1/steps is usual.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps; give at least 1")
    lowest = shift_sigmas(1e-3, shift) if lowest is None else lowest
    return np.append(shift_sigmas(np.linspace(1.0, lowest, steps), shift), 0.0)


def image_shift(tokens: int) -> float:
    """The shift exp(mu) that grows with the number of image tokens: mu is 0.5 at 256 and 1.15 at 4096 (FLUX)."""
    return float(np.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)))


def level_at(schedule: Schedule, timesteps: Table) -> Level:
    """Levels of integer timesteps of any shape, float32; on the device, so timesteps may be traced."""
    timesteps = jnp.asarray(timesteps, jnp.int32)
    alpha, sigma = (jnp.asarray(table, jnp.float32) for table in level_tables(schedule.alphas_cumprod))
    return Level(alpha[timesteps], sigma[timesteps])


def flow_level(sigmas: Array) -> Level:
    """Levels of a straight path, float32: alpha = 1 - sigma."""
    sigmas = jnp.asarray(sigmas, jnp.float32)
    return Level(1 - sigmas, sigmas)


def level_tables(alphas_cumprod: np.ndarray) -> Level:
    """Alpha and sigma of signal variances, float64 on the host: 1 - abar in float32 would lose digits of sigma."""
    return Level(np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod))


def per_example(values: Table | float, latents: Array) -> Array:
    """Float32 values [] or [B] with unit axes behind, so that they multiply latents [B, ...]."""
    values = jnp.asarray(values, jnp.float32)
    if values.ndim and values.shape != latents.shape[:1]:
        raise ValueError(f"values of shape {values.shape} for latents of shape {latents.shape}; give one per example")
    return values.reshape(values.shape + (1,) * (latents.ndim - 1)) if values.ndim else values


def add_noise(clean: Array, noise: Array, level: Level) -> Array:
    """Latents at a level, alpha * clean + sigma * noise, float32 [B, ...].

    Args:
      clean, noise: [B, ...], any float dtype.
      level: alpha and sigma [] or [B].
    """
    alpha, sigma = (per_example(v, clean) for v in level)
    return alpha * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def offset_noise(key: Array, noise: Array, *, strength: float = 0.05) -> Array:
    """Noise [B, ..., C] plus one Gaussian shift per example and channel, float32; it is also the new target.

    Args:
      key: of the batch, or keys [B] of its examples.
    """
    shape = (noise.shape[0], *(1,) * (noise.ndim - 2), noise.shape[-1])
    return noise.astype(jnp.float32) + strength * normal(key, shape)


def snr(level: Level) -> Array:
    """Signal-to-noise ratio alpha^2 / sigma^2, float32; finite also for clean latents."""
    alpha, sigma = (jnp.asarray(v, jnp.float32) for v in level)
    return jnp.square(alpha) / jnp.square(jnp.maximum(sigma, SMALLEST))


def min_snr_weight(level: Level, parameterisation: Parameterisation, *, gamma: float = 5.0) -> Array:
    """Min-SNR-gamma weight of the squared error of the predicted quantity, float32 (arXiv 2303.09556).

    min(SNR, gamma) is the weight of the clean latents' error; the prediction's error is (det / sigma)^2 times that one.
    This gives min(SNR, gamma) / SNR for noise, / (SNR + 1) for the velocity and * sigma^2 for straight paths.
    """
    require_positive(gamma=gamma)
    alpha, sigma = (jnp.maximum(jnp.asarray(v, jnp.float32), SMALLEST) for v in level)
    a, b = parameterisation(alpha, sigma)
    return jnp.minimum(jnp.square(alpha), gamma * jnp.square(sigma)) / jnp.square(alpha * a - sigma * b)


def min_snr_plus_one_weight(level: Level, *, gamma: float = 5.0) -> Array:
    """Min-SNR-gamma with 1 added to the SNR, min(SNR + 1, gamma) / (SNR + 1), of the velocity's squared error, float32.

    Without the 1 the velocity's weight is zero at pure noise, and zero terminal SNR teaches its last level nothing.
    """
    require_positive(gamma=gamma)
    alpha, sigma = (jnp.square(jnp.asarray(v, jnp.float32)) for v in level)
    return jnp.minimum(1.0, gamma * sigma / (alpha + sigma))


def sigma_sqrt_weight(sigmas: Array) -> Array:
    """Weight 1 / s^2 of the squared error at levels of a straight path above 0, float32 ("sigma_sqrt")."""
    return 1 / jnp.square(jnp.asarray(sigmas, jnp.float32))


def cosmap_weight(sigmas: Array) -> Array:
    """Weight 2 / (pi (1 - 2 s + 2 s^2)) at levels of a straight path, float32 (arXiv 2403.03206, section 3.1).

    A density: with it uniform levels weigh like those of a cosine schedule.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    return 2 / (jnp.pi * (1 - 2 * sigmas + 2 * jnp.square(sigmas)))


def predicts_noise(alpha: Table, sigma: Table) -> tuple[float, float]:
    """The model predicts the noise (epsilon)."""
    return 1.0, 0.0


def predicts_clean(alpha: Table, sigma: Table) -> tuple[float, float]:
    """The model predicts the clean latents (sample, x0)."""
    return 0.0, 1.0


def predicts_velocity(alpha: Table, sigma: Table) -> tuple[Table, Table]:
    """The model predicts v = alpha * noise - sigma * clean."""
    return alpha, -sigma


def predicts_flow(alpha: Table, sigma: Table) -> tuple[float, float]:
    """The model predicts the direction of a straight path, noise - clean."""
    return 1.0, -1.0


def prediction_target(clean: Array, noise: Array, level: Level, parameterisation: Parameterisation) -> Array:
    """What a perfect model would predict, float32 [B, ...]."""
    a, b = parameterisation(*(per_example(v, clean) for v in level))
    return jnp.asarray(a * noise.astype(jnp.float32) + b * clean.astype(jnp.float32))


def denoised(prediction: Array, latents: Array, level: Level, parameterisation: Parameterisation) -> Denoised:
    """The clean latents and the noise that a prediction at given latents stands for, float32.

    Where the level hides one of the two (predicted noise at alpha = 0, predicted clean latents at sigma = 0), that one
    is zero and the other is the prediction.

    Args:
      prediction, latents: [B, ...], any float dtype.
      level: alpha and sigma [] or [B].
    """
    prediction, latents = prediction.astype(jnp.float32), latents.astype(jnp.float32)
    alpha, sigma = (per_example(v, latents) for v in level)
    a, b = parameterisation(alpha, sigma)
    determinant = alpha * a - sigma * b
    hidden = determinant == 0
    determinant = jnp.where(hidden, 1.0, determinant)  # before the division, for the gradient's sake
    return Denoised(
        clean=jnp.where(hidden, b * prediction, (a * latents - sigma * prediction) / determinant),
        noise=jnp.where(hidden, a * prediction, (alpha * prediction - b * latents) / determinant),
    )


def convert_prediction(
    prediction: Array, latents: Array, level: Level, *, source: Parameterisation, target: Parameterisation
) -> Array:
    """The same prediction in another parameterisation, float32 [B, ...]."""
    return prediction_target(*denoised(prediction, latents, level, source), level, target)


def implied_noise(latents: Array, clean: Array, level: Level) -> Array:
    """The noise that leads from clean latents to given ones, (x - alpha * clean) / sigma, float32; 0 at sigma = 0."""
    return denoised(clean, latents, level, predicts_clean).noise


def _require_steps(steps: int, timesteps: int) -> None:
    if not 1 <= steps <= timesteps:
        raise ValueError(f"{steps} sampling steps of {timesteps} timesteps; give 1 to {timesteps}")
