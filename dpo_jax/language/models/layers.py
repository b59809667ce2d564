"""What a decoder is built of: projections, norms, attention, feed-forward, one layer; features chosen by the config."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.elements import ACTIVATIONS, normal
from dpo_jax.language.models.experts import Experts, RouterSums
from dpo_jax.language.models.kernels import SmallKernel, linear_product
from dpo_jax.language.models.rope import rotate
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, constrain
from dpo_jax.types import Array


class Linear(nnx.Module):
    """x @ kernel (+ bias), kernel [in, out]; with an adapter (`dpo_jax.lora`) where a model is given its leaves.

    A frozen kernel may be in few bits (`kernels.SmallKernel`).
    """

    def __init__(self, size_in: int, size_out: int, *, bias: bool, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.kernel: nnx.Param | SmallKernel = nnx.Param(normal(rngs.params(), (size_in, size_out), config))
        self.bias = nnx.Param(jnp.zeros((size_out,), config.param_dtype)) if bias else None
        self.lora_a = self.lora_b = self.lora_scale = self.lora_magnitude = None

    def __call__(self, x: Array) -> Array:
        # As one matrix: on CPU the gradient of a batched product inside a scan takes twice as long.
        rows, adapter = x.reshape(-1, x.shape[-1]), None
        if self.lora_a is not None and self.lora_b is not None and self.lora_scale is not None:
            magnitude = None if self.lora_magnitude is None else self.lora_magnitude[...]
            a, b, scale = self.lora_a[...], self.lora_b[...], self.lora_scale[...]
            adapter = {"a": a, "b": b, "scale": scale, "magnitude": magnitude}
        y = linear_product(rows, self.kernel, adapter, self.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Norm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) or layer norm (arXiv 1607.06450) of the last axis, in float32."""

    def __init__(self, size: int, *, config: DecoderConfig):
        self.dtype, self.epsilon, self.kind = jnp.dtype(config.dtype), config.norm_epsilon, config.norm
        start = jnp.zeros if config.norm == "rms_offset" else jnp.ones
        self.scale = nnx.Param(start((size,), config.param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), config.param_dtype)) if config.norm == "layer" else None

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...]
        if self.kind == "rms":
            return wide.astype(self.dtype) * scale.astype(self.dtype)
        # These two are rounded once, after the scale.
        wide = wide * (scale.astype(jnp.float32) + (1.0 if self.kind == "rms_offset" else 0.0))
        wide = wide if self.bias is None else wide + self.bias[...].astype(jnp.float32)
        return wide.astype(self.dtype)


class Attention(nnx.Module):
    """Grouped-query attention, with rotary positions if it is given any."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        linear = partial(Linear, config=config, rngs=rngs)
        inner = partial(linear, bias=config.attention_bias or config.qkv_bias)
        self.query = inner(config.hidden_size, config.heads * config.head_dim)
        self.key = inner(config.hidden_size, config.key_value_heads * config.head_dim)
        self.value = inner(config.hidden_size, config.key_value_heads * config.head_dim)
        self.output = linear(config.heads * config.head_dim, config.hidden_size, bias=config.attention_bias)
        self.query_norm = Norm(config.head_dim, config=config) if config.query_key_norm else None
        self.key_norm = Norm(config.head_dim, config=config) if config.query_key_norm else None

    def project(self, x: Array, rotations: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        """Query [R, L, H, Dh], key and value [R, L, Hkv, Dh], normed and rotated."""

        def heads(y: Array) -> Array:
            y = y.reshape(*y.shape[:2], -1, self.head_dim)  # [R, L, H * Dh] -> [R, L, H, Dh]
            return constrain(y, BATCH_AXES, None, MODEL_AXIS)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        query = query if self.query_norm is None else self.query_norm(query)
        key = key if self.key_norm is None else self.key_norm(key)
        if rotations is None:
            return query, key, value
        return rotate(query, *rotations), rotate(key, *rotations), value


class FeedForward(nnx.Module):
    """Two projections with an activation between, gated (arXiv 2002.05202) or not."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.activation = config.activation
        linear = partial(Linear, bias=config.mlp_bias, config=config, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size) if config.gated else None
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        activate = ACTIVATIONS[self.activation]
        hidden = activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, BATCH_AXES, None, MODEL_AXIS))


class Layer(nnx.Module):
    """Attention and feed-forward (dense, or a mixture of experts), each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        norm = partial(Norm, config.hidden_size, config=config)
        self.parallel = config.residual != "sequential"
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.attention_post_norm = norm() if config.post_norms else None
        self.feed_forward_norm = None if config.residual == "parallel_shared" else norm()
        self.feed_forward = None if config.experts else FeedForward(config, rngs=rngs)
        self.experts = Experts(config, rngs=rngs) if config.experts else None
        self.feed_forward_post_norm = norm() if config.post_norms else None

    def __call__(
        self,
        x: Array,
        rotations: tuple[Array, Array] | None,
        attend: Callable[[Array, Array, Array], Array],
        counted: Array | None = None,
    ) -> tuple[Array, RouterSums | None]:
        """[R, L, D] -> [R, L, D], and what the router did, if there is one.

        Args:
          rotations: cosine and sine, or None where positions are not rotary.
          attend: `attend(query, key, value)` is tree attention, or attention to a cache.
          counted: bool [R, L], tokens that the router's sums are over; None for no sums.
        """
        normed = self.attention_norm(x)
        seen = attend(*self.attention.project(normed, rotations))
        seen = self.attention.output(seen.reshape(*x.shape[:2], -1))
        seen = seen if self.attention_post_norm is None else self.attention_post_norm(seen)
        after = x + seen
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(x if self.parallel else after)
        fed, routed = self._fed(normed, counted)
        fed = fed if self.feed_forward_post_norm is None else self.feed_forward_post_norm(fed)
        return constrain(after + fed, BATCH_AXES, None, None), routed

    def _fed(self, x: Array, counted: Array | None) -> tuple[Array, RouterSums | None]:
        if self.experts is not None:
            return self.experts(x, counted)
        assert self.feed_forward is not None
        return self.feed_forward(x), None


class Embedding(nnx.Module):
    """Table [N, D], of the words, of the head or of learned positions."""

    def __init__(self, size: int, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(rngs.params(), (size, config.hidden_size), config))


class HeadBias(nnx.Module):
    """A number for each word [V]."""

    def __init__(self, config: DecoderConfig):
        self.bias = nnx.Param(jnp.zeros((config.vocabulary_size,), config.param_dtype))


class RewardHead(nnx.Module):
    """One row [1, D] that makes a reward of a hidden state; its start is that of Ouyang et al. 2022."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        row = jax.random.normal(rngs.params(), (1, config.hidden_size), jnp.float32)
        self.weight = nnx.Param((row / math.sqrt(config.hidden_size + 1)).astype(config.param_dtype))
