"""One decoder for the Llama family, on prefix trees and with a cache; its features are chosen by its config.

Rows are int32 [R, L] of tokens, path positions and subtree ends (`dpo_jax.language.types.Batch`). Layers are stacked
and scanned: the program does not grow with depth. Other families add fields to the config, not subclasses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_jax.attention import attention, decode_attention
from dpo_jax.functional import functional
from dpo_jax.language.types import Prediction
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, P, constrain
from dpo_jax.types import Array, PyTree

# Stacked kernels lead with the layer axis.
RULES = (
    (r"layers/.*(query|key|value|gate|up)/kernel$", P(None, "fsdp", "model")),
    (r"layers/.*(output|down)/kernel$", P(None, "model", "fsdp")),
    (r"layers/.*(query|key|value|gate|up)/bias$", P(None, "model")),
    (r"embedding$", P("model", "fsdp")),
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and their scaling to longer contexts.

    Attributes:
      theta: base of the frequencies.
      kind: "default", "linear" (positions divided by factor), "llama3" or "yarn" (arXiv 2309.00071).
      factor: how much longer the context becomes.
      original_length: context of the training before scaling (llama3, yarn).
      low_frequency_factor, high_frequency_factor: llama3's band between scaled and unscaled frequencies.
      beta_fast, beta_slow: yarn's band, in rotations over the original context.
      attention_factor: what cosine and sine are multiplied by (yarn).
      truncate: whether yarn rounds its band to whole dimensions.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder, and how it runs.

    Attributes:
      vocabulary_size, hidden_size, intermediate_size, layers, heads, key_value_heads, head_dim: V, D, F, depth, H, ...
      norm_epsilon: of the RMS norms.
      rope: rotary positions.
      tie_embeddings: the head is the embedding.
      reward: the head is one row that makes a number of the last hidden state, instead of the vocabulary's.
      attention_bias, mlp_bias: biases in the projections.
      initializer_range: standard deviation of random kernels and embeddings.
      dtype: type of the computation; norms, rotations, softmax and log-probs are float32.
      param_dtype: type of the parameters.
      remat: what a layer's backward pass computes again: "none", "dots" (all but matrix products), "full".
    """

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    norm_epsilon: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    reward: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of a head's dimensions, float32 [head_dim / 2]."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = config.theta**-exponent
    if config.kind == "linear":
        base = base / config.factor
    elif config.kind == "llama3":
        rotations = config.original_length * base / (2 * math.pi)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        base = kept * base + (1 - kept) * base / config.factor
    elif config.kind == "yarn":
        kept = 1 - _yarn_ramp(config, head_dim)
        base = kept * base + (1 - kept) * base / config.factor
    return base.astype(np.float32)


def _yarn_ramp(config: RopeConfig, head_dim: int) -> np.ndarray:
    """0 where a frequency is kept, 1 where it is divided by the factor, linear between; [head_dim / 2]."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    return np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)


def rotations(config: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine, float32 [R, L, 1, head_dim / 2], of path positions [R, L]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config, head_dim)
    return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotate the halves of each head against each other: [R, L, H, head_dim], computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)


def _normal(key: Array, shape: tuple[int, ...], config: DecoderConfig) -> Array:
    return (jax.random.normal(key, shape, jnp.float32) * config.initializer_range).astype(config.param_dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias), kernel [in, out]."""

    def __init__(self, size_in: int, size_out: int, *, bias: bool, config: DecoderConfig, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.kernel = nnx.Param(_normal(rngs.params(), (size_in, size_out), config))
        self.bias = nnx.Param(jnp.zeros((size_out,), config.param_dtype)) if bias else None

    def __call__(self, x: Array) -> Array:
        # As one matrix: on CPU the gradient of a batched product inside a scan takes twice as long.
        y = (x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(self.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Norm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, size: int, *, config: DecoderConfig):
        self.dtype, self.epsilon = jnp.dtype(config.dtype), config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((size,), config.param_dtype))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(self.dtype) * self.scale[...].astype(self.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        linear = partial(Linear, bias=config.attention_bias, config=config, rngs=rngs)
        self.query = linear(config.hidden_size, config.heads * config.head_dim)
        self.key = linear(config.hidden_size, config.key_value_heads * config.head_dim)
        self.value = linear(config.hidden_size, config.key_value_heads * config.head_dim)
        self.output = linear(config.heads * config.head_dim, config.hidden_size)

    def project(self, x: Array, cosine: Array, sine: Array) -> tuple[Array, Array, Array]:
        """Query [R, L, H, Dh], key and value [R, L, Hkv, Dh], rotated."""

        def heads(y: Array) -> Array:
            y = y.reshape(*y.shape[:2], -1, self.head_dim)  # [R, L, H * Dh] -> [R, L, H, Dh]
            return constrain(y, BATCH_AXES, None, MODEL_AXIS)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        return rotate(query, cosine, sine), rotate(key, cosine, sine), value


class FeedForward(nnx.Module):
    """Gated linear unit with SiLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        linear = partial(Linear, bias=config.mlp_bias, config=config, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        hidden = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, BATCH_AXES, None, MODEL_AXIS))


class Layer(nnx.Module):
    """Attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config.hidden_size, config=config)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config.hidden_size, config=config)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, x: Array, cosine: Array, sine: Array, attend: Callable[[Array, Array, Array], Array]) -> Array:
        """[R, L, D] -> [R, L, D]; `attend(query, key, value)` is tree attention, or attention to a cache."""
        seen = attend(*self.attention.project(self.attention_norm(x), cosine, sine))
        x = x + self.attention.output(seen.reshape(*x.shape[:2], -1))
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return constrain(x, BATCH_AXES, None, None)


class Embedding(nnx.Module):
    """Table [V, D], of the words or of the head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        shape = (config.vocabulary_size, config.hidden_size)
        self.embedding = nnx.Param(_normal(rngs.params(), shape, config))


class RewardHead(nnx.Module):
    """One row [1, D] that makes a reward of a hidden state; its start is that of Ouyang et al. 2022."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        row = jax.random.normal(rngs.params(), (1, config.hidden_size), jnp.float32)
        self.weight = nnx.Param((row / math.sqrt(config.hidden_size + 1)).astype(config.param_dtype))


_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Decoder(nnx.Module):
    """Tokens to hidden states and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        self.config = config
        self.embed = Embedding(config, rngs=rngs)
        self.layers = stacked(rngs)
        self.norm = Norm(config.hidden_size, config=config)
        self.head = None if config.tie_embeddings or config.reward else Embedding(config, rngs=rngs)
        self.score = RewardHead(config, rngs=rngs) if config.reward else None

    def __call__(self, tokens: Array, positions: Array, subtree_end: Array) -> Prediction:
        """Hidden states of rows of prefix trees.

        Args:
          tokens, positions, subtree_end: int32 [R, L].

        Returns:
          hidden [R, L, D] in the compute dtype, head [V, D] (of a reward model [1, D]) in the parameters' dtype.
        """
        attend = partial(attention, subtree_end=subtree_end, positions=positions)
        hidden, _ = self._run(tokens, positions, lambda query, key, value, _: (attend(query, key, value), None), None)
        return self._predict(hidden)

    def decode(
        self, tokens: Array, positions: Array, cache: tuple[Array, Array], start: Array, mask: Array
    ) -> tuple[Prediction, tuple[Array, Array]]:
        """Hidden states of the next tokens of sequences whose keys and values are kept.

        Args:
          tokens, positions: int32 [N, Q].
          cache: keys and values, each [layers, N, C, Hkv, Dh] (`empty_cache`).
          start: int32 [] or [N], column of the cache where the first of the Q tokens goes, for all rows or for each.
          mask: bool [N, Q, C], which columns each query sees.

        Returns:
          the answer for the Q tokens, and the cache with their keys and values.
        """

        # Rows that are not equally far write at columns of their own.
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        put = jax.vmap(put, in_axes=(0, 0, 0 if start.ndim else None))

        def attend(query: Array, key: Array, value: Array, kept: tuple[Array, Array]):
            keys, values = (put(old, new.astype(old.dtype), start) for old, new in zip(kept, (key, value)))
            return decode_attention(query, keys.astype(query.dtype), values.astype(query.dtype), mask), (keys, values)

        hidden, cache = self._run(tokens, positions, attend, cache)
        return self._predict(hidden), cache

    def _run(self, tokens: Array, positions: Array, attend: Callable, cache: PyTree) -> tuple[Array, PyTree]:
        """All layers, scanned; `attend` also gets the layer's part of the cache and gives the new one back."""
        config = self.config
        # Words looked up in a table split over fsdp come out split along D, and cannot go to the rows' layout cheaply.
        table = constrain(self.embed.embedding[...], MODEL_AXIS, None)
        x = table[tokens].astype(config.dtype)
        x = constrain(x, BATCH_AXES, None, None)
        cosine, sine = rotations(config.rope, config.head_dim, positions)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x: Array, part: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
            state, kept = part
            kept_after = None

            def attend_here(query: Array, key: Array, value: Array) -> Array:
                nonlocal kept_after
                seen, kept_after = attend(query, key, value, kept)
                return seen

            x = nnx.merge(graphdef, state)(x, cosine, sine, attend_here)
            return x, kept_after

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT[config.remat], prevent_cse=False)
        x, cache = jax.lax.scan(layer, x, (stacked, cache))
        return self.norm(x), cache

    def _predict(self, hidden: Array) -> Prediction:
        if self.score is not None:
            return Prediction(hidden, self.score.weight[...])
        table = self.embed if self.head is None else self.head
        return Prediction(hidden, table.embedding[...])


def empty_cache(config: DecoderConfig, rows: int, columns: int) -> tuple[Array, Array]:
    """Keys and values of nothing yet, each zeros [layers, N, C, Hkv, Dh] in the compute dtype."""
    shape = (config.layers, rows, columns, config.key_value_heads, config.head_dim)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def decoder_function(config: DecoderConfig) -> Callable:
    """`apply_fn(variables, tokens, positions, subtree_end)` of a config, without making any weights."""
    return functional(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def init_variables(config: DecoderConfig, key: Array) -> PyTree:
    """Random weights: kernels and embeddings normal, norms 1, biases 0."""
    return functional(Decoder(config, rngs=nnx.Rngs(params=key)))[1]


def abstract_variables(config: DecoderConfig) -> PyTree:
    """Shapes and dtypes of the variables, without making any."""
    return functional(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1]
