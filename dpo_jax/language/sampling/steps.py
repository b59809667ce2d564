"""Models as step functions: one token for each row in, logits of the next ones out, keys and values kept between.

The cores of sampling and beam search know no models, only

    step_fn(tokens int32 [N], state) -> (logits [N, V] or [N, M, V], state)

with any pytree as state; M > 1 are models in lock-step on the same tokens, the first of which chooses. Here such a
function is made of decoders with a cache. A row's token at position p stands in column p of its cache, so rows need not
be equally long: what lies behind a row's position is never seen, and is overwritten as the row grows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.language.methods.r_to_q import proxy_logits
from dpo_jax.language.types import Prediction
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, constrain
from dpo_jax.types import Array, PyTree

StepFunction = Callable[[Array, PyTree], tuple[Array, PyTree]]
Combine = Callable[[Array], Array]  # logits of all models [N, M, V] -> those to choose from, [N, V] or [N, M', V]

PREFILL_BLOCK = 256  # prompt tokens at a time: attention scores of a prompt grow with this times its length


@dataclass(frozen=True)
class CachedModel:
    """A decoder that answers token by token.

    Attributes:
      apply_fn: of the model, with a method `decode` (`language.models.decoder.Decoder.decode`).
      empty_cache: (rows, columns) -> cache, every leaf [layers, rows, columns, heads, ...].
    """

    apply_fn: Callable[..., Any]
    empty_cache: Callable[[int, int], PyTree]


class CacheState(NamedTuple):
    """Where each row is.

    Attributes:
      caches: of each model, leaves [layers, N, C, heads, ...].
      positions: int32 [N], column of the row's next token.
    """

    caches: tuple[PyTree, ...]
    positions: Array


def step_function(
    models: Sequence[CachedModel], variables: Sequence[PyTree], combine: Combine | None = None
) -> StepFunction:
    """The models in lock-step as one step function over a `CacheState`.

    Args:
      models: of one vocabulary.
      variables: of each model, used in place.
      combine: makes the logits to choose from of all models'; by default each model's are handed on.
    """

    def step(tokens: Array, state: CacheState) -> tuple[Array, CacheState]:
        at = state.positions
        columns = jax.tree.leaves(state.caches)[0].shape[2]
        seen = (jnp.arange(columns) <= at[:, None])[:, None]  # [N, 1, C]
        logits, caches = [], []
        for model, values, cache in zip(models, variables, state.caches, strict=True):
            answer = model.apply_fn(values, tokens[:, None], at[:, None], cache, at, seen, method="decode")
            logits.append(last_logits(answer[0]))
            caches.append(answer[1])
        together = jnp.stack(logits, axis=1)  # [N, M, V]
        return together if combine is None else combine(together), CacheState(tuple(caches), at + 1)

    return step


def guided(strength: float) -> Combine:
    """Proxy-guided decoding of three models (base, tuned, reference of the tuned one): see `r_to_q.proxy_logits`."""

    def combine(logits: Array) -> Array:
        base, tuned, reference = (logits[:, place] for place in range(3))
        return proxy_logits(base_logits=base, tuned_logits=tuned, reference_logits=reference, strength=strength)

    return combine


def prefill(
    models: Sequence[CachedModel], variables: Sequence[PyTree], tokens: Array, lengths: Array
) -> tuple[Array, CacheState]:
    """Keys and values of prompts, up to where a step function goes on.

    Args:
      tokens: int32 [R, P], prompts padded on the right.
      lengths: int32 [R] of the prompts, from 1 on.

    Returns:
      int32 [R], the last token of each prompt, which the step function is to be given first; and the state before it,
      with P columns.
    """
    rows, width = tokens.shape
    size = min(width, PREFILL_BLOCK)
    blocks = -(-width // size)
    padded = jnp.pad(tokens, ((0, 0), (0, blocks * size - width)))
    column = jnp.arange(blocks * size)
    caches = []
    for model, values in zip(models, variables, strict=True):

        def block(cache: PyTree, number: Array, model: CachedModel = model, values: PyTree = values):
            start = number * size
            at = start + jnp.arange(size)
            seen = jnp.broadcast_to(column <= at[:, None], (rows, size, len(column)))
            part = jax.lax.dynamic_slice_in_dim(padded, start, size, axis=1)
            # Padding stays within the prompt's positions: a model may have no others.
            positions = jnp.minimum(at, lengths[:, None] - 1)
            return model.apply_fn(values, part, positions, cache, start, seen, method="decode")[1], None

        cache = spread_cache(model.empty_cache(rows, len(column)))
        cache, _ = jax.lax.scan(block, cache, jnp.arange(blocks))
        caches.append(jax.tree.map(lambda leaf: leaf[:, :, :width], cache))
    last = jnp.take_along_axis(tokens, (lengths - 1)[:, None], axis=1)[:, 0]
    return last, CacheState(tuple(caches), lengths - 1)


def widen(state: CacheState, columns: int) -> CacheState:
    """The state with columns added behind, up to as many as given."""

    def widened(leaf: Array) -> Array:
        return jnp.pad(leaf, [(0, 0), (0, 0), (0, columns - leaf.shape[2]), *[(0, 0)] * (leaf.ndim - 3)])

    return CacheState(spread_cache(jax.tree.map(widened, state.caches)), state.positions)


def spread_cache(cache: PyTree) -> PyTree:
    """Rows over the batch axes, heads over the model axis of the active mesh."""
    return jax.tree.map(lambda leaf: constrain(leaf, None, BATCH_AXES, None, MODEL_AXIS), cache)


def take_cache_rows(state: CacheState, rows: Array) -> CacheState:
    """Rows of each group of a state, as beam search reorders them; nothing crosses groups.

    Args:
      state: of B * K rows, group by group.
      rows: int32 [B, K'], for each group which of its K rows to take.
    """
    caches = jax.tree.map(lambda leaf: jax.vmap(lambda part: take_rows(part, rows))(leaf), state.caches)
    return CacheState(spread_cache(caches), take_rows(state.positions, rows))


def take_rows(state: PyTree, rows: Array) -> PyTree:
    """The same for any pytree whose leaves lead with the B * K rows."""

    def taken(leaf: Array) -> Array:
        grouped = leaf.reshape(rows.shape[0], -1, *leaf.shape[1:])  # [B * K, ...] -> [B, K, ...]
        return jax.vmap(lambda group, index: group[index])(grouped, rows).reshape(-1, *leaf.shape[1:])

    return jax.tree.map(taken, state)


def last_logits(prediction: Prediction) -> Array:
    """Float32 [N, V] of the last column of hidden states [N, Q, D]."""
    hidden, head = prediction.hidden[:, -1], prediction.head
    logits = jnp.einsum("nd,vd->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if prediction.bias is not None:
        logits = logits + prediction.bias
    logits = constrain(logits, BATCH_AXES, None)
    return logits if prediction.softcap is None else prediction.softcap * jnp.tanh(logits / prediction.softcap)
