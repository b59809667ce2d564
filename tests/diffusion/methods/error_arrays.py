"""Small float64 errors for tests of losses over images, and a model that every test can differentiate."""

import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import linear_schedule, per_example, predicts_noise
from dpo_jax.diffusion.types import DiffusionBatch

PAIR = ("chosen", "rejected")
PROCESS = Process(predicts_noise, linear_schedule(20, end=0.4))


def errors(seed=0, sides=PAIR, rows=5, spread=0.2):
    """Float64 errors [B] of both models for every side; the policy strays from the reference by `spread`."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in sides:
        arrays[f"reference_{side}_error"] = rng.gamma(4.0, 0.2, rows)
        arrays[f"policy_{side}_error"] = arrays[f"reference_{side}_error"] + rng.normal(0, spread, rows)
    return arrays


def gains(arrays, side):
    return arrays[f"reference_{side}_error"] - arrays[f"policy_{side}_error"]


def margin(arrays, sides=PAIR):
    return gains(arrays, sides[0]) - gains(arrays, sides[1])


def at_margin(m):
    """Float64 errors [B] of pairs with these margins m."""
    m = np.atleast_1d(np.asarray(m, float))
    ones = np.ones_like(m)
    return {
        "policy_chosen_error": 2 * ones,
        "policy_rejected_error": ones,
        "reference_chosen_error": 2 * ones + m,
        "reference_rejected_error": ones,
    }


def denoiser(params):
    """A model with a scale and a pull towards its condition, params [2]."""

    def predict(latents, times, condition):
        return params[0] * jnp.tanh(latents + per_example(times / 20, latents)) + params[1] * condition

    return predict


def batch_of(rows=4, images=2, shape=(3, 2), seed=0, own_conditions=False, **columns):
    """Rows of images [B, K, ...] and conditions of their form, those of a row being equal unless they are its own."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(rows, images, *shape)).astype(np.float32)
    condition = rng.normal(size=(rows, images if own_conditions else 1, *shape)).astype(np.float32)
    return DiffusionBatch(latents, condition, np.ones(rows, np.float32), columns)
