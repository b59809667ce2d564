"""One layer that sees latents [N, ..., C], the timestep and a condition [N, C], for tests of objectives."""

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.schedule import per_example


def variables(seed=0, channels=4):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "kernel": jax.random.normal(keys[0], (channels, channels)) * channels**-0.5,
        "time": jax.random.normal(keys[1], (channels,)),
    }


def predict(params, latents, timesteps, condition):
    time = per_example(timesteps / 1000, latents) * params["time"]
    told = condition.reshape(condition.shape[0], *(1,) * (latents.ndim - 2), -1)
    return jnp.tanh(latents @ params["kernel"] + time + told)
