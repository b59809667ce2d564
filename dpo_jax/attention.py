"""Attention over rows that hold forests of sequences in depth-first order.

Query q sees key k iff `k <= q < subtree_end[k]`: causal attention, packing, shared prompts, lists and trees in one rule
(with one prompt and two completions it is the mask of Wang and Hegde 2024, arXiv 2410.20305). Two forms give the same
numbers: the plain one holds all scores [L, L]; the blocked one goes through blocks of keys with a running softmax
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), keeps no scores, and skips every
block of keys that no query of its block sees, which in packed rows is most of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, P, active_mesh, fit_spec
from dpo_jax.types import Array

# Longest row for which `attention` takes the plain form. Measured on a CPU, forward and backward: equal at 128 to 256
# tokens, from 512 on the blocked form is 3 to 30 times faster.
PLAIN_LENGTH = 256

# Score of what a query may not see. Finite, so that a query that sees nothing makes no inf - inf.
_HIDDEN = -1e30


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    subtree_end: Array,
    positions: Array | None = None,
    window: int | Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: Callable[..., Array] | None = None,
) -> Array:
    """Attention under the prefix-tree rule, by the form that suits the row's length.

    Args:
      query: [R, L, H, Dh], any float dtype; products accumulate and the softmax is taken in float32.
      key, value: [R, L, Hkv, Dh], H a multiple of Hkv; query head h uses key head h // (H / Hkv).
      subtree_end: int32 [R, L], index at which the subtree of the token's node ends; 0 for padding.
      positions: int32 [R, L], position along the token's own path; needed by a window.
      window: keys at a path distance `positions[q] - positions[k]` of this or more are not seen; may be traced.
      softcap: scores become `softcap * tanh(scores / softcap)`.
      scale: factor of the scores, Dh^-0.5 by default.
      implementation: a function with the same arguments, such as `plain_attention`; by default chosen by length.

    Returns:
      [R, L, H, Dh] in the dtype of `query`; zero, with zero gradient, where a query sees no key.

    Raises:
      ValueError: shapes that do not fit, or a window without positions.
    """
    if implementation is None:
        # The place to prefer a kernel of the platform, when there is one that knows this mask.
        implementation = plain_attention if query.shape[1] <= PLAIN_LENGTH else blocked_attention
    tree = {"subtree_end": subtree_end, "positions": positions, "window": window}
    return implementation(query, key, value, **tree, softcap=softcap, scale=scale)


def tree_mask(subtree_end: Array) -> Array:
    """Bool [R, L, L]: whether query q (axis 1) sees key k (axis 2), from int32 [R, L]."""
    index = jnp.arange(subtree_end.shape[1])
    return _sees(index, index, subtree_end)


def plain_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    subtree_end: Array,
    positions: Array | None = None,
    window: int | Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Array:
    """`attention` with all scores at once, float32 [R, H, L, L]: fastest for short rows, and the reference."""
    tree = _tree(query, key, value, subtree_end, positions, window)
    mask = tree_mask(tree.subtree_end)
    if tree.window is not None and tree.positions is not None:
        mask &= _near(tree.positions, tree.positions, tree.window)
    return decode_attention(query, key, value, mask, softcap=softcap, scale=scale)


def decode_attention(
    query: Array, key: Array, value: Array, mask: Array, *, softcap: float | None = None, scale: float | None = None
) -> Array:
    """Attention under an explicit mask, such as that of new tokens against a cache.

    Args:
      query: [N, P, H, Dh], the P newest tokens.
      key, value: [N, C, Hkv, Dh], the cache, H a multiple of Hkv.
      mask: bool [N, P, C], whether the query sees the key.
      softcap, scale: as in `attention`.

    Returns:
      [N, P, H, Dh] in the dtype of `query`; zero where a query sees no key.

    Raises:
      ValueError: shapes that do not fit.
    """
    _require_heads(query, key, value)
    if mask.shape != (*query.shape[:2], key.shape[1]):
        raise ValueError(f"mask {mask.shape} must be [N, P, C] of query {query.shape} and key {key.shape}")
    scores = jnp.einsum("nqhgd,nkhd->nhgqk", _grouped(query, key), key, preferred_element_type=jnp.float32)
    scores = _capped(scores * _scale(query, scale), softcap)
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, _HIDDEN)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    output = jnp.einsum("nhgqk,nkhd->nqhgd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return output.reshape(query.shape).astype(query.dtype)


def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    subtree_end: Array,
    positions: Array | None = None,
    window: int | Array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    block_size: int = 256,
) -> Array:
    """`attention` block by block: memory linear in L, forward and backward, and no work for blocks nobody sees.

    Keeps the output and one log-sum-exp per query and head; the backward pass computes the scores again. Rows come one
    after the other, so that each skips by its own trees; under `vmap` all blocks are computed. Under a mesh every
    device works on its own rows (data, fsdp) and heads (model, if it divides both H and Hkv), without communication.
    Reverse mode only. `block_size` is the number of queries and of keys in a block; L need not be a multiple of it.
    """
    tree = _tree(query, key, value, subtree_end, positions, window)
    options = _Options(min(block_size, query.shape[1]), softcap, _scale(query, scale))
    return _blocked(options, query, key, value, tree)


class _Tree(NamedTuple):
    """Who sees whom: subtree_end and positions int32 [R, L] (or one row [L]), window int32 []; None if unused."""

    subtree_end: Array
    positions: Array | None
    window: Array | None


@dataclass(frozen=True)
class _Options:
    """What is static: one compiled program per value."""

    block_size: int
    softcap: float | None
    scale: float


def _require_heads(query: Array, key: Array, value: Array) -> None:
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"query {query.shape}, key {key.shape} and value {value.shape} do not fit each other")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads are not a multiple of {key.shape[2]} key heads")


def _tree(query: Array, key: Array, value: Array, subtree_end, positions, window) -> _Tree:
    _require_heads(query, key, value)
    if query.shape[1] != key.shape[1] or subtree_end.shape != query.shape[:2]:
        raise ValueError(f"query {query.shape}, key {key.shape}, subtree_end {subtree_end.shape} differ in [R, L]")
    if window is None:
        return _Tree(jnp.asarray(subtree_end), None, None)
    if positions is None or positions.shape != subtree_end.shape:
        raise ValueError("a window counts along paths; give positions [R, L]")
    return _Tree(jnp.asarray(subtree_end), jnp.asarray(positions), jnp.asarray(window, jnp.int32))


def _scale(query: Array, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _grouped(query: Array, key: Array) -> Array:
    """[..., H, Dh] -> [..., Hkv, G, Dh]: the G query heads that share a key head."""
    return query.reshape(*query.shape[:-2], key.shape[-2], -1, query.shape[-1])


def _capped(scores: Array, softcap: float | None) -> Array:
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _sees(query_index: Array, key_index: Array, subtree_end: Array) -> Array:
    """[..., q, k] from indices [q], [k] and the subtree_end [..., k] of the keys."""
    q = query_index[:, None]
    return (key_index <= q) & (q < subtree_end[..., None, :])


def _near(query_positions: Array, key_positions: Array, window: Array) -> Array:
    """[..., q, k] from path positions [..., q], [..., k]."""
    return query_positions[..., :, None] - key_positions[..., None, :] < window


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(options: _Options, query: Array, key: Array, value: Array, tree: _Tree) -> Array:
    return _blocked_forward(options, query, key, value, tree)[0]


def _blocked_forward(options: _Options, query: Array, key: Array, value: Array, tree: _Tree):
    def rows(query, key, value, tree):
        return _over_rows(partial(_row_forward, options), tree, query, key, value)

    run = _spread(rows, query, key, inputs=3, outputs=2)
    output, lse = run(query, key, value, tree)
    return output, (query, key, value, tree, output, lse)


def _blocked_backward(options: _Options, residuals, gradient: Array):
    query, key, value, tree, output, lse = residuals

    def rows(query, key, value, output, lse, gradient, tree):
        return _over_rows(partial(_row_backward, options), tree, query, key, value, output, lse, gradient)

    run = _spread(rows, query, key, inputs=6, outputs=3)
    return *run(query, key, value, output, lse, gradient, tree), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _spread(function: Callable, query: Array, key: Array, *, inputs: int, outputs: int) -> Callable:
    """The function on each device's own rows and heads; arrays lead with [R, L, H], the tree comes last."""
    mesh = active_mesh()
    if mesh is None:
        return function
    rows = fit_spec(P(BATCH_AXES), query.shape, mesh)[0]
    heads = [fit_spec(P(MODEL_AXIS), x.shape[2:], mesh)[0] for x in (query, key)]
    spec = P(rows, None, heads[0] if heads[0] == heads[1] else None)
    in_specs = (*[spec] * inputs, _Tree(P(rows), P(rows), P()))  # type: ignore[arg-type]
    # Without replication checks: the loops' carries start from zeros that no device owns.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=(spec,) * outputs, check_vma=False)


def _over_rows(function: Callable, tree: _Tree, *arrays: Array):
    """`function(tree, *arrays)` on one row after the other, never on all: a skipped block must not be computed."""

    def row(xs):
        subtree_end, positions, *rest = xs
        return function(_Tree(subtree_end, positions, tree.window), *rest)

    return jax.lax.map(row, (tree.subtree_end, tree.positions, *arrays))


def _blocks(x: Array, size: int) -> Array:
    """[L, ...] -> [n, size, ...], padded with zeros: a padded token has subtree_end 0, so that nobody sees it."""
    count = -(-x.shape[0] // size)
    x = jnp.pad(x, [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])


def _key_blocks(x: Array, size: int) -> Array:
    """[L, Hkv, Dh] -> [n, Hkv, size, Dh]."""
    return _blocks(x, size).swapaxes(1, 2)


def _query_blocks(x: Array, groups: int, size: int) -> Array:
    """[L, H, ...] -> [n, Hkv, G, size, ...]."""
    x = _blocks(x, size)
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, groups, *x.shape[3:]), 1, 3)


def _from_query_blocks(x: Array, length: int) -> Array:
    """[n, Hkv, G, size, ...] -> [L, H, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(-1, x.shape[2] * x.shape[3], *x.shape[4:])[:length]


def _from_key_blocks(x: Array, length: int) -> Array:
    """[n, Hkv, size, Dh] -> [L, Hkv, Dh]."""
    x = x.swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])[:length]


def _tree_blocks(tree: _Tree, size: int) -> _Tree:
    """One row's tree with subtree_end and positions int32 [n, size]."""
    positions = None if tree.positions is None else _blocks(tree.positions, size)
    return _Tree(_blocks(tree.subtree_end, size), positions, tree.window)


def _needed(tree: _Tree, i: Array, j: Array) -> Array:
    """False only if no query of block i sees a key of block j <= i."""
    needed = jnp.max(tree.subtree_end[j]) > i * tree.subtree_end.shape[1]
    if tree.window is not None and tree.positions is not None:
        needed &= jnp.min(tree.positions[i]) - jnp.max(tree.positions[j]) < tree.window
    return needed


def _block_mask(tree: _Tree, i: Array, j: Array) -> Array:
    """Bool [size, size] of the queries of block i and the keys of block j."""
    index = jnp.arange(tree.subtree_end.shape[1])
    mask = _sees(i * index.size + index, j * index.size + index, tree.subtree_end[j])
    if tree.window is not None and tree.positions is not None:
        mask &= _near(tree.positions[i], tree.positions[j], tree.window)
    return mask


def _scores(options: _Options, query: Array, key: Array, mask: Array) -> Array:
    """Float32 [Hkv, G, size, size] of a block of queries [Hkv, G, size, Dh] and one of keys [Hkv, size, Dh]."""
    scores = jnp.einsum("hgqd,hkd->hgqk", query, key, preferred_element_type=jnp.float32) * options.scale
    return jnp.where(mask, _capped(scores, options.softcap), _HIDDEN)


def _row_forward(options: _Options, tree: _Tree, query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """Output [L, H, Dh] and log-sum-exp float32 [L, H] of one row."""
    groups = query.shape[1] // key.shape[1]
    tree = _tree_blocks(tree, options.block_size)
    queries = _query_blocks(query, groups, options.block_size)
    keys, values = _key_blocks(key, options.block_size), _key_blocks(value, options.block_size)

    def query_block(_, i):
        def key_block(j, carry):
            top, total, output = carry
            mask = _block_mask(tree, i, j)
            scores = _scores(options, queries[i], keys[j], mask)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - higher[..., None]), 0.0)
            decay = jnp.exp(top - higher)
            part = jnp.einsum(
                "hgqk,hkd->hgqd", weights.astype(value.dtype), values[j], preferred_element_type=jnp.float32
            )
            return higher, total * decay + jnp.sum(weights, axis=-1), output * decay[..., None] + part

        def if_needed(j, carry):
            return jax.lax.cond(_needed(tree, i, j), key_block, lambda _, carry: carry, j, carry)

        zeros = jnp.zeros(queries.shape[1:], jnp.float32)
        start = (jnp.full(zeros.shape[:-1], _HIDDEN), zeros[..., 0], zeros)
        top, total, output = jax.lax.fori_loop(0, i + 1, if_needed, start)
        total = jnp.where(total > 0, total, 1.0)
        return None, ((output / total[..., None]).astype(query.dtype), top + jnp.log(total))

    _, (output, lse) = jax.lax.scan(query_block, None, jnp.arange(queries.shape[0]))
    length = query.shape[0]
    return _from_query_blocks(output, length), _from_query_blocks(lse, length)


def _row_backward(
    options: _Options, tree: _Tree, query: Array, key: Array, value: Array, output: Array, lse: Array, gradient: Array
) -> tuple[Array, Array, Array]:
    """Gradients of query [L, H, Dh], key and value [L, Hkv, Dh] of one row, in their dtypes."""
    groups, length = query.shape[1] // key.shape[1], query.shape[0]
    tree = _tree_blocks(tree, options.block_size)
    # sum_k p_k dp_k of each query, from the output alone.
    drift = jnp.sum(gradient.astype(jnp.float32) * output.astype(jnp.float32), axis=-1)
    queries, gradients, lses, drifts = (
        _query_blocks(x, groups, options.block_size) for x in (query, gradient.astype(value.dtype), lse, drift)
    )
    keys, values = _key_blocks(key, options.block_size), _key_blocks(value, options.block_size)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def pair(i, j):
        mask = _block_mask(tree, i, j)
        scores = _scores(options, queries[i], keys[j], mask)
        weights = jnp.where(mask, jnp.exp(scores - lses[i][..., None]), 0.0)
        slope = weights * (product("hgqd,hkd->hgqk", gradients[i], values[j]) - drifts[i][..., None])
        if options.softcap is not None:
            slope = slope * jnp.where(mask, 1 - jnp.square(scores / options.softcap), 0.0)
        slope = (slope * options.scale).astype(query.dtype)
        d_query = product("hgqk,hkd->hgqd", slope, keys[j])
        d_key = product("hgqk,hgqd->hkd", slope, queries[i])
        d_value = product("hgqk,hgqd->hkd", weights.astype(value.dtype), gradients[i])
        return d_query, d_key, d_value

    def nothing(i, j):
        # Parts, not running sums, pass through the branch: XLA would copy the whole sums at every block.
        d_key = jnp.zeros(keys.shape[1:], jnp.float32)
        return jnp.zeros(queries.shape[1:], jnp.float32), d_key, d_key

    def query_block(sums, i):
        def key_block(j, carry):
            d_query, d_keys, d_values = carry
            part, d_key, d_value = jax.lax.cond(_needed(tree, i, j), pair, nothing, i, j)
            return d_query + part, d_keys.at[j].add(d_key), d_values.at[j].add(d_value)

        start = (jnp.zeros(queries.shape[1:], jnp.float32), *sums)
        d_query, *sums = jax.lax.fori_loop(0, i + 1, key_block, start)
        return tuple(sums), d_query.astype(query.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (d_keys, d_values), d_queries = jax.lax.scan(query_block, (zeros, zeros), jnp.arange(queries.shape[0]))
    d_key, d_value = _from_key_blocks(d_keys, length), _from_key_blocks(d_values, length)
    return _from_query_blocks(d_queries, length), d_key.astype(key.dtype), d_value.astype(value.dtype)
