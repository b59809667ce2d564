"""Noise on a policy's parameters, for losses whose gradient is zero where the policy is the reference."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.lora import MAGNITUDE, SCALE, A, B
from dpo_jax.ops import require_positive, safe_divide
from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import Array, PyTree


def perturb(variables: PyTree, key: Array, share: float, *, trainable: Callable[[str], bool]) -> PyTree:
    """Variables whose trainable leaves have Gaussian noise of a share of their own standard deviation.

    Constant leaves, such as zero biases, stay. Of an adapter only B moves, such that s A B is noise of that share of
    its kernel's deviation. Leaves keep shape and dtype; each has a key of its own, folded from the given one.

    Args:
      variables: nested dicts of arrays; adapters stand beside their kernels.
      share: 1e-3 leaves samples as they are.
      trainable: of a leaf's path name.

    Raises:
      ValueError: share not positive.
    """
    require_positive(share=share)
    leaves = named_leaves(variables)
    numbers = {name: number for number, name in enumerate(leaves)}

    def deviation(name: str, leaf: Array) -> Array:
        folder, _, kind = name.rpartition("/")
        if kind != B:
            return jnp.std(leaf.astype(jnp.float32))
        a, scale, kernel = (leaves[f"{folder}/{part}"].astype(jnp.float32) for part in (A, SCALE, "kernel"))
        # Each entry of A B is a sum over the rank of products of independent factors.
        unit = scale[..., None, None] * jnp.std(a) * leaf.shape[-2] ** 0.5
        return safe_divide(jnp.std(kernel), unit)

    def moved(name: str, leaf: Array) -> Array:
        if not trainable(name) or name.endswith((A, MAGNITUDE)):
            return leaf
        noise = jax.random.normal(jax.random.fold_in(key, numbers[name]), leaf.shape)
        return (leaf.astype(jnp.float32) + share * deviation(name, leaf) * noise).astype(leaf.dtype)

    return map_named(moved, variables)
