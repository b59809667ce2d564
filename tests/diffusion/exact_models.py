"""Models whose best prediction is known: Gaussian data and mixtures of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
from make_scheduler_fixtures import FILE, toy_model

from dpo_jax.diffusion.schedule import Schedule, flow_level, level_at, per_example, prediction_target
from dpo_jax.diffusion.types import Denoised

EXPECTED = np.load(FILE)
MEAN, SPREAD = 0.6, 0.4
# Log SNR on a line from 12 to -12, so fine that every grid is even.
EVEN = Schedule(1 / (1 + np.exp(-np.linspace(6.0, -6.0, 60_001))))


def network(latents, timesteps, condition):
    """The fixtures' network; a condition [B, ...] is added."""
    said = toy_model(jnp, latents, per_example(timesteps, latents))
    return said if condition is None else said + condition


def level_of(schedule, timesteps):
    """Level at timesteps as models are given them; no schedule stands for straight paths."""
    return level_at(schedule, timesteps) if isinstance(schedule, Schedule) else flow_level(timesteps / 1000)


def gaussian_model(schedule, parameterisation, mean=MEAN, spread=SPREAD):
    """The best prediction for data N(mean, spread^2), any number of axes."""

    def predict(latents, timesteps, condition):
        level = level_of(schedule, timesteps)
        alpha, sigma = (per_example(v, latents) for v in level)
        noise = sigma * (latents - alpha * mean) / (alpha**2 * spread**2 + sigma**2)
        clean = mean + alpha * spread**2 * (latents - alpha * mean) / (alpha**2 * spread**2 + sigma**2)
        return prediction_target(clean, noise, level, parameterisation)

    return predict


def gaussian_flow(latents, here, end=(1.0, 0.0), mean=MEAN, spread=SPREAD):
    """Where the probability flow of N(mean, spread^2) takes latents from one level to another, in float64."""

    def moments(level):
        alpha, sigma = (np.float64(v) for v in level)
        return alpha * mean, np.sqrt(alpha**2 * spread**2 + sigma**2)

    (middle, width), (end_middle, end_width) = moments(here), moments(end)
    return end_middle + end_width * (np.asarray(latents, np.float64) - middle) / width


def mixture_model(schedule, parameterisation, centres, spread):
    """The best prediction for an even mixture of Gaussians at centres [M, D], latents [B, D]."""
    centres = jnp.asarray(centres, jnp.float32)

    def predict(latents, timesteps, condition):
        level = level_of(schedule, timesteps)
        alpha, sigma = (per_example(v, latents) for v in level)
        variance = alpha**2 * spread**2 + sigma**2
        offsets = latents[:, None] - alpha[..., None] * centres  # [B, M, D]
        shares = jax.nn.softmax(-0.5 * jnp.sum(offsets**2, -1) / variance)[..., None]  # [B, M, 1]
        pull = jnp.sum(shares * offsets, 1) / variance  # minus the score
        clean = jnp.sum(shares * (centres + alpha[..., None] * spread**2 * offsets / variance[..., None]), 1)
        return prediction_target(*Denoised(clean, sigma * pull), level, parameterisation)

    return predict
