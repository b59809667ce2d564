"""One decoder for many families, on prefix trees and with a cache; its features are chosen by its config.

Rows are int32 [R, L] of tokens, path positions and subtree ends (`dpo_jax.language.types.Batch`). Layers are stacked
and scanned: the program does not grow with depth. Layers that differ (local and global ones) differ in numbers that are
scanned with their weights. Other families add fields to the config, not subclasses.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.attention import attention, decode_attention
from dpo_jax.functional import abstract_module, function_of, functional, set_adapters, shapes_of
from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.experts import RouterSums
from dpo_jax.language.models.kernels import set_small_kernels
from dpo_jax.language.models.layers import Embedding, HeadBias, Layer, Norm, RewardHead
from dpo_jax.language.models.rope import RopeConfig, in_long_trees, rotations
from dpo_jax.language.types import Prediction, Routing
from dpo_jax.lora import adapter_rules
from dpo_jax.quantize import Kind, quantized_rules
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, P, constrain
from dpo_jax.types import Array, PyTree

__all__ = [
    "RULES",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "RopeConfig",
    "abstract_variables",
    "decoder_function",
    "empty_cache",
    "init_variables",
    "most_decoded",
]

# Stacked kernels lead with the layer axis.
RULES = (
    (r"layers/.*(query|key|value|gate|up)/kernel$", P(None, "fsdp", "model")),
    (r"layers/.*(output|down)/kernel$", P(None, "model", "fsdp")),
    (r"layers/.*(query|key|value|gate|up)/bias$", P(None, "model")),
    (r"positions/embedding$", P(None, "fsdp")),
    (r"layers/experts/(gate|up)/kernels$", P(None, "expert", "fsdp", "model")),
    (r"layers/experts/down/kernels$", P(None, "expert", "model", "fsdp")),
    (r"layers/experts/router/weight$", P(None, "fsdp")),
    (r"embedding$", P("model", "fsdp")),
    (r"head_bias/bias$", P("model")),
)
RULES += (*adapter_rules(RULES), *quantized_rules(RULES))

_REMAT = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_EVERYWHERE = 2**30  # no path is that long


class Cache(NamedTuple):
    """Keys and values that are kept between calls of `Decoder.decode`; in every leaf axis 1 is N and axis 2 is C.

    Attributes:
      keys, values: [layers, N, C, Hkv, Dh].
      positions: int32 [1, N, C] of the keys, for models with a window; None for others.
    """

    keys: Array
    values: Array
    positions: Array | None


class _Local(NamedTuple):
    """What differs from layer to layer besides weights, as arrays [layers]; None where nothing does."""

    window: Array | None
    rope: Array | None


# query, key, value, the layer's part of the cache, its window -> what the queries see, the new part
_Attend = Callable[[Array, Array, Array, PyTree, Array | None], tuple[Array, PyTree]]


class Decoder(nnx.Module):
    """Tokens to hidden states and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        if len(config.local_layers) not in (0, config.layers):
            raise ValueError(f"local_layers has {len(config.local_layers)} entries for {config.layers} layers")
        if config.experts and not 1 <= config.experts_per_token <= config.experts:
            raise ValueError(f"experts_per_token is {config.experts_per_token} of {config.experts} experts")
        if config.experts and (config.mlp_bias or not config.gated):
            raise ValueError("experts are gated and without biases; a config with mlp_bias or gated=False has none")

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        words = config.vocabulary_size
        self.config = config
        self.embed = Embedding(words, config, rngs=rngs)
        self.layers = stacked(rngs)
        self.norm = Norm(config.hidden_size, config=config)
        self.head = None if config.tie_embeddings or config.reward else Embedding(words, config, rngs=rngs)
        self.score = RewardHead(config, rngs=rngs) if config.reward else None
        self.head_bias = HeadBias(config) if config.head_bias and not config.reward else None
        learned = config.learned_positions
        self.positions = Embedding(learned, config, rngs=rngs) if learned else None

    def __call__(self, tokens: Array, positions: Array, subtree_end: Array) -> Prediction:
        """Hidden states of rows of prefix trees.

        Args:
          tokens, positions, subtree_end: int32 [R, L].

        Returns:
          hidden [R, L, D] in the compute dtype, head [V, D] (of a reward model [1, D]) in the parameters' dtype; with
          experts also how the tokens that are no padding were routed, each counted once.
        """
        seen = partial(attention, subtree_end=subtree_end, positions=positions, **self._scores())

        def attend(query: Array, key: Array, value: Array, _: None, window: Array | None):
            return seen(query, key, value, window=window), None

        counted = jnp.asarray(subtree_end) > 0
        rope, long = self.config.rope, None
        if rope.kind == "longrope":
            long = in_long_trees(jnp.asarray(positions), jnp.asarray(subtree_end), rope.original_length)
        hidden, _, routed = self._run(tokens, positions, attend, None, counted, long)
        return self._predict(hidden)._replace(routing=self._routing(routed, counted))

    def decode(
        self, tokens: Array, positions: Array, cache: Cache, start: Array, mask: Array
    ) -> tuple[Prediction, Cache]:
        """Hidden states of the next tokens of sequences whose keys and values are kept.

        Args:
          tokens, positions: int32 [N, Q].
          cache: of `empty_cache`, or of the call before.
          start: int32 [] or [N], column of the cache where the first of the Q tokens goes, for all rows or for each.
          mask: bool [N, Q, C], which columns each query sees; windows narrow it further.

        Returns:
          the answer for the Q tokens, and the cache with their keys and values; NaN for tokens behind `most_decoded`.
        """

        # Rows that are not equally far write at columns of their own.
        put = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        put = jax.vmap(put, in_axes=(0, 0, 0 if start.ndim else None))
        places = None if cache.positions is None else put(cache.positions[0], positions, start)[None]

        def attend(query: Array, key: Array, value: Array, kept: tuple[Array, Array], window: Array | None):
            keys, values = (put(old, new.astype(old.dtype), start) for old, new in zip(kept, (key, value)))
            seen = mask
            if window is not None and places is not None:
                seen &= positions[:, :, None] - places[0][:, None, :] < window
            near = keys.astype(query.dtype), values.astype(query.dtype)
            return decode_attention(query, *near, seen, **self._scores()), (keys, values)

        hidden, (keys, values), _ = self._run(tokens, positions, attend, (cache.keys, cache.values))
        if self.config.rope.kind == "longrope":
            # All keys in the cache would have to be turned again; no answer is better than a wrong one.
            hidden = jnp.where((positions < self.config.rope.original_length)[..., None], hidden, jnp.nan)
        return self._predict(hidden), Cache(keys, values, places)

    def _scores(self) -> dict[str, float | None]:
        scalar = self.config.query_scalar
        return {"softcap": self.config.attention_softcap, "scale": None if scalar is None else scalar**-0.5}

    def _run(
        self,
        tokens: Array,
        positions: Array,
        attend: _Attend,
        cache: PyTree,
        counted: Array | None = None,
        long: Array | None = None,
    ) -> tuple[Array, PyTree, RouterSums | None]:
        """All layers, scanned; `attend` also gets the layer's part of the cache and gives the new one back."""
        config = self.config
        x = self._embedded(tokens, positions)
        dimensions = config.rotary_dim or config.head_dim
        turn = None if config.learned_positions else rotations(config.rope, dimensions, positions, long)
        local_turn = None if config.local_rope is None else rotations(config.local_rope, dimensions, positions)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x: Array, part: tuple[PyTree, PyTree, _Local]) -> tuple[Array, tuple[PyTree, RouterSums | None]]:
            state, kept, local = part
            kept_after = None

            def attend_here(query: Array, key: Array, value: Array) -> Array:
                nonlocal kept_after
                seen, kept_after = attend(query, key, value, kept, local.window)
                return seen

            here, near = turn, local.rope
            if near is not None:
                here = jax.tree.map(lambda a, b: jnp.where(near, a, b), local_turn, turn)
            x, routed = nnx.merge(graphdef, state)(x, here, attend_here, counted)
            return x, (kept_after, routed)

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT[config.remat], prevent_cse=False)
        x, (cache, routed) = jax.lax.scan(layer, x, (stacked, cache, self._local()))
        x = self.norm(x)
        if config.learned_positions:
            # Behind the last position an answer would only be wrong, and nobody would notice. Others that see such a
            # token, or mask it, keep their numbers.
            x = jnp.where((positions < config.learned_positions)[..., None], x, jnp.nan)
        return x, cache, routed

    def _embedded(self, tokens: Array, positions: Array) -> Array:
        """Words and learned positions, [R, L, D] in the compute dtype."""
        config = self.config
        # Words looked up in a table split over fsdp come out split along D, and cannot go to the rows' layout cheaply.
        table = constrain(self.embed.embedding[...], MODEL_AXIS, None)
        x = table[tokens].astype(config.dtype)
        if config.embedding_scale:
            x = x * jnp.asarray(math.sqrt(config.hidden_size), config.dtype)
        if self.positions is not None:
            table = constrain(self.positions.embedding[...], None, None)
            x = x + table.at[positions].get(mode="clip").astype(config.dtype)
        return constrain(x, BATCH_AXES, None, None)

    def _local(self) -> _Local:
        config = self.config
        local = jnp.asarray(config.local_layers or (True,) * config.layers)
        window = None if config.window is None else jnp.where(local, config.window, _EVERYWHERE)
        return _Local(window, None if config.local_rope is None else local)

    def _routing(self, sums: RouterSums | None, counted: Array) -> Routing | None:
        """Means over the tokens that count; sums are [layers, ...]."""
        if sums is None:
            return None
        config, tokens = self.config, jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
        # Both factors are means over all layers, as transformers has it.
        load, probability = (jnp.mean(x, axis=0) / tokens for x in (sums.chosen, sums.probabilities))
        balance = config.experts * jnp.sum(load * probability)
        shares = sums.chosen / (tokens * config.experts_per_token)
        return Routing(shares, balance, sums.entropy / tokens, config.router_loss * balance)

    def _predict(self, hidden: Array) -> Prediction:
        if self.score is not None:
            return Prediction(hidden, self.score.weight[...])
        table = self.embed if self.head is None else self.head
        bias = None if self.head_bias is None else self.head_bias.bias[...]
        return Prediction(hidden, table.embedding[...], bias, self.config.logit_softcap)


def most_decoded(config: DecoderConfig) -> int:
    """Most tokens of a sequence that `Decoder.decode` answers for; 0 for any number.

    Beyond its original context a model with longrope turns all earlier keys in another way, and a cache keeps them.
    """
    return config.rope.original_length if config.rope.kind == "longrope" else config.learned_positions


def empty_cache(config: DecoderConfig, rows: int, columns: int) -> Cache:
    """Keys and values of nothing yet, zeros in the compute dtype."""
    shape = (config.layers, rows, columns, config.key_value_heads, config.head_dim)
    positions = None if config.window is None else jnp.zeros((1, rows, columns), jnp.int32)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), positions)


def decoder_function(config: DecoderConfig, adapters: PyTree = None, *, kernels: Kind | None = None) -> Callable:
    """`apply_fn(variables, tokens, positions, subtree_end)` of a config, without making any weights.

    Args:
      adapters: of the variables that the function will get (`dpo_jax.lora`), arrays or their shapes; None for the base.
      kernels: of the variables that the function will get: in few bits (`dpo_jax.quantize`), or None as they are.

    Raises:
      ValueError: an adapter of what is no linear layer.
    """
    if adapters is None and kernels is None:
        return function_of(Decoder, config)
    model = abstract_module(Decoder, config)
    set_adapters(model, adapters)
    if kernels is not None:
        set_small_kernels(model, kernels)
    return functional(model)[0]


def init_variables(config: DecoderConfig, key: Array) -> PyTree:
    """Random weights: kernels and embeddings normal, norms 1, biases 0."""
    return functional(Decoder(config, rngs=nnx.Rngs(params=key)))[1]


def abstract_variables(config: DecoderConfig) -> PyTree:
    """Shapes and dtypes of the variables, without making any."""
    return shapes_of(Decoder, config)
