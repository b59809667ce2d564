"""What all layers start from: random kernels, activations."""

from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.types import Array

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def normal(key: Array, shape: tuple[int, ...], config: DecoderConfig) -> Array:
    """Random numbers of the config's standard deviation, in the parameters' dtype."""
    return (jax.random.normal(key, shape, jnp.float32) * config.initializer_range).astype(config.param_dtype)
