"""What diffusion models, autoencoders and CLIP are built of: projections, convolutions, norms, attention, embeddings.

Images are [B, H, W, C] and sequences [B, L, D]. Parameters have the types of `Types`; norms, softmax and embeddings of
timesteps are float32 whatever the model computes in. A linear layer takes an adapter's leaves (`dpo_jax.lora`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.lora import adapt
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, constrain
from dpo_jax.types import Array

_QUERIES = 1024  # queries whose scores are alive at a time


class Types(NamedTuple):
    """Types of a model: of its computation and of its parameters."""

    compute: Any = jnp.float32
    params: Any = jnp.float32


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}


def _uniform(key: Array, shape: tuple[int, ...], inputs: int, types: Types) -> Array:
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(types.params)


class Linear(nnx.Module):
    """x @ kernel (+ bias), kernel [in, out]."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool = True, types: Types, rngs: nnx.Rngs):
        self.types = types
        self.kernel = nnx.Param(_uniform(rngs.params(), (size_in, size_out), size_in, types))
        self.bias = nnx.Param(jnp.zeros((size_out,), types.params)) if bias else None
        self.lora_a = self.lora_b = self.lora_scale = self.lora_magnitude = None

    def __call__(self, x: Array) -> Array:
        rows, kernel = x.reshape(-1, x.shape[-1]).astype(self.types.compute), self.kernel[...]
        y = rows @ kernel.astype(rows.dtype)
        if self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
            magnitude = None if self.lora_magnitude is None else self.lora_magnitude[...]
            a, b, scale = self.lora_a[...], self.lora_b[...], self.lora_scale[...]
            y = adapt(y, rows, kernel, a=a, b=b, scale=scale, magnitude=magnitude)
        y = y.reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Conv(nnx.Module):
    """A convolution over height and width, kernel [h, w, in, out]; padding is torch's, before and after each axis."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        window: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        bias: bool = True,
        types: Types,
        rngs: nnx.Rngs,
    ):
        self.types, self.stride = types, stride
        self.padding = (window // 2, window // 2) if padding is None else padding
        shape = (window, window, size_in, size_out)
        self.kernel = nnx.Param(_uniform(rngs.params(), shape, window * window * size_in, types))
        self.bias = nnx.Param(jnp.zeros((size_out,), types.params)) if bias else None

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.types.compute)
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, self.stride),
            (self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class GroupNorm(nnx.Module):
    """Groups of channels normed over height, width and the group, in float32 (arXiv 1803.08494)."""

    def __init__(self, channels: int, *, groups: int = 32, epsilon: float = 1e-5, types: Types):
        if channels % groups:
            raise ValueError(f"{channels} channels do not fall into {groups} groups")
        self.types, self.groups, self.epsilon = types, groups, epsilon
        self.scale = nnx.Param(jnp.ones((channels,), types.params))
        self.bias = nnx.Param(jnp.zeros((channels,), types.params))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        mean = jnp.mean(wide, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(wide - mean), axis=(1, 3), keepdims=True)
        wide = ((wide - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(self.types.compute)


class LayerNorm(nnx.Module):
    """Layer norm of the last axis in float32 (arXiv 1607.06450), with or without a scale and a bias."""

    def __init__(self, size: int, *, epsilon: float = 1e-5, affine: bool = True, types: Types):
        self.types, self.epsilon = types, epsilon
        self.scale = nnx.Param(jnp.ones((size,), types.params)) if affine else None
        self.bias = nnx.Param(jnp.zeros((size,), types.params)) if affine else None

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None and self.bias is not None:
            wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(self.types.compute)


class RMSNorm(nnx.Module):
    """Root-mean-square norm of the last axis in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, *, epsilon: float = 1e-6, types: Types):
        self.types, self.epsilon = types, epsilon
        self.scale = nnx.Param(jnp.ones((size,), types.params))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...].astype(jnp.float32)).astype(self.types.compute)


class Embedding(nnx.Module):
    """A table [N, D] that is looked up by int32 ids."""

    def __init__(self, size: int, width: int, *, types: Types, rngs: nnx.Rngs):
        self.types = types
        table = jax.random.normal(rngs.params(), (size, width), jnp.float32) * 0.02
        self.embedding = nnx.Param(table.astype(types.params))

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids].astype(self.types.compute)


def timestep_embedding(
    timesteps: Array, size: int, *, flip: bool = True, shift: float = 0.0, largest_period: float = 10_000.0
) -> Array:
    """Sines and cosines of timesteps, float32 [B, size] (arXiv 1706.03762, as diffusion models arrange them).

    Args:
      timesteps: [B], whole or fractional.
      size: even.
      flip: cosines come first.
      shift: taken off the number of frequencies in the exponent's divisor.
    """
    half = size // 2
    frequencies = jnp.exp(-math.log(largest_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)


def split_heads(x: Array, heads: int) -> Array:
    """[B, L, H * Dh] -> [B, L, H, Dh], heads over the model axis."""
    return constrain(x.reshape(*x.shape[:-1], heads, -1), BATCH_AXES, None, MODEL_AXIS)


def attend(query: Array, key: Array, value: Array, *, mask: Array | None = None, causal: bool = False) -> Array:
    """Softmax attention, [B, L, H, Dh] -> [B, L, H * Dh]; the scores of about a thousand queries are alive at a time.

    Args:
      query: [B, L, H, Dh]; key, value: [B, S, H, Dh].
      mask: bool [B, S], which keys may be seen; all by default.
      causal: a query sees keys up to its own place.
    """
    length, size = query.shape[1], query.shape[-1]
    kernel = length > _QUERIES and mask is None and query.dtype != jnp.float32 and jax.default_backend() == "gpu"
    if kernel and size % 8 == 0 and size <= 128:
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="cudnn")
        return seen.reshape(*query.shape[:2], -1)

    # Heads first: on CPU products of matrices that lie together take half the time.
    key, value = jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1)

    def block(query: Array, first: Array | int) -> Array:
        near = jnp.moveaxis(query, 2, 1)  # [B, L, H, Dh] -> [B, H, L, Dh]
        scores = jnp.einsum("bhld,bhsd->bhls", near, key, preferred_element_type=jnp.float32) / math.sqrt(size)
        if mask is not None:  # finite: who sees nothing at all sees the mean, and no NaN
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        if causal:
            place = first + jnp.arange(near.shape[2])
            scores = jnp.where(jnp.arange(key.shape[2]) <= place[:, None], scores, -jnp.inf)
        seen = jnp.einsum("bhls,bhsd->bhld", jax.nn.softmax(scores).astype(value.dtype), value)
        return jnp.moveaxis(seen, 1, 2)

    if length <= _QUERIES or length % _QUERIES:
        seen = block(query, 0)
    else:
        count = length // _QUERIES
        blocks = jnp.moveaxis(query.reshape(query.shape[0], count, _QUERIES, *query.shape[2:]), 1, 0)
        body = jax.checkpoint(lambda part: block(*part), prevent_cse=False)
        seen = jnp.moveaxis(jax.lax.map(body, (blocks, jnp.arange(count) * _QUERIES)), 0, 1)
    return seen.reshape(*query.shape[:2], -1)
