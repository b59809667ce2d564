"""Frozen kernels in 8 or 4 bits, of which each layer makes its kernel when it needs it.

Dettmers et al. 2023, arXiv 2305.14314 (QLoRA); the values of NF4 are those of its appendix E.
    int8:  W = q s,             q from -127 to 127, s = max |W| / 127 of each output
    nf4:   W = NF4[code] s,     s = max |W| of each block of 64 inputs of an output
Rounding is to the nearest, so |error| <= s / 2 with int8, and with nf4 half the gap of two neighbouring values times s.
The scales stay float32: 8 bits and little more, or 4.5 bits for each entry.

A kernel [..., in, out] becomes a dict in its place: {"int8": int8 [..., in, out], "scale": [..., 1, out]}, or {"nf4":
uint8 [..., in / 2, out], "scale": [..., ceil(in / 64), out]}, two inputs in a byte, the first in its lower half. The
axes stand where the kernel has them, so that rules of its layout hold for its parts.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dpo_jax.tree import map_named
from dpo_jax.types import Array, PyTree

Kind = Literal["int8", "nf4"]

BLOCK = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize(kernel: Array, kind: Kind) -> dict[str, Array]:
    """The parts of a kernel [..., in, out].

    Raises:
      ValueError: an odd number of inputs, which do not fill bytes of NF4.
    """
    wide = kernel.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.max(jnp.abs(wide), axis=-2, keepdims=True) / 127
        return {"int8": jnp.round(wide / _not_zero(scale)).astype(jnp.int8), "scale": scale}
    *lead, size_in, size_out = kernel.shape
    if size_in % 2:
        raise ValueError(f"a kernel with {size_in} inputs does not fall into pairs; quantize it to int8")
    blocks = -(-size_in // BLOCK)
    filled = jnp.pad(wide, (*((0, 0),) * len(lead), (0, blocks * BLOCK - size_in), (0, 0)))
    scale = jnp.max(jnp.abs(filled.reshape(*lead, blocks, BLOCK, size_out)), axis=-2)
    middles = (np.array(NF4[1:]) + np.array(NF4[:-1])) / 2
    part = wide / _not_zero(_repeated(scale, size_in))
    codes = jnp.zeros(part.shape, jnp.uint8)
    for middle in middles:
        codes += (part > np.float32(middle)).astype(jnp.uint8)
    return {"nf4": codes[..., ::2, :] | codes[..., 1::2, :] << 4, "scale": scale}


def dequantize(parts: Mapping[str, Array]) -> Array:
    """The kernel that `quantize` made these parts of, up to its error; float32 [..., in, out]."""
    if "int8" in parts:
        return parts["int8"].astype(jnp.float32) * parts["scale"]
    pairs = parts["nf4"]
    *lead, half, size_out = pairs.shape
    codes = jnp.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*lead, 2 * half, size_out)
    values = jnp.take(jnp.asarray(NF4, jnp.float32), codes.astype(jnp.int32), mode="clip")
    return values * _repeated(parts["scale"], 2 * half)


def _repeated(scale: Array, size_in: int) -> Array:
    return jnp.repeat(scale, BLOCK, axis=-2)[..., :size_in, :]


def _not_zero(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, 1.0)


def _is_kernel(name: str) -> bool:
    return name.rsplit("/", 1)[-1] == "kernel"


def quantize_kernels(variables: PyTree, kind: Kind, *, selected: Callable[[str], bool] = _is_kernel) -> PyTree:
    """Variables with their kernels in few bits.

    Args:
      variables: nested dicts of arrays.
      selected: of a leaf's path name; by default all that are called `kernel`.

    Raises:
      ValueError: a kernel that cannot be; the message names it.
    """

    def parts(name: str, leaf: Array) -> PyTree:
        if not selected(name):
            return leaf
        try:
            return quantize(leaf, kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return map_named(parts, variables)


def dequantize_kernels(variables: PyTree) -> PyTree:
    """Variables with float32 kernels in place of those that `quantize_kernels` made small."""

    def whole(node: PyTree) -> PyTree:
        return dequantize(node) if is_quantized(node) else node

    return jax.tree.map(whole, variables, is_leaf=is_quantized)


def is_quantized(node: PyTree) -> bool:
    """Whether a node of a tree is a kernel in few bits."""
    return isinstance(node, Mapping) and set(node) in ({"int8", "scale"}, {"nf4", "scale"})


def quantized_rules(rules: tuple[tuple[str, PartitionSpec], ...]) -> tuple[tuple[str, PartitionSpec], ...]:
    """Sharding rules of kernels in few bits: those of the kernels."""
    return tuple(
        (f"{pattern.removesuffix('$')}/(int8|nf4|scale)$", spec)
        for pattern, spec in rules
        if pattern.endswith("kernel$")
    )
