"""Random numbers from the key of a batch, or from keys of its examples.

Draws from an example's own key do not depend on the batch, the microbatch or the device that it is computed in.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax.types import Array


def of_examples(key: Array) -> bool:
    """Whether there is a key for each example of a batch."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal noise, float32 of a shape [B, ...].

    Args:
      key: of the batch, or keys [B] of its examples.
    """
    if of_examples(key):
        return jax.vmap(lambda one: jax.random.normal(one, shape[1:], jnp.float32))(key)
    return jax.random.normal(key, shape, jnp.float32)


def split_keys(key: Array, count: int) -> Array:
    """Keys [S] of S steps from the key of a batch, or [S, B] from keys of its examples."""
    split = partial(jax.random.split, num=count)
    return jax.vmap(split, out_axes=1)(key) if of_examples(key) else split(key)
