"""Merging models tuned from one base, without training.

Task arithmetic: Ilharco et al. 2022, arXiv 2212.04089; soups: Wortsman et al. 2022, arXiv 2203.05482; TIES: Yadav et
al. 2023, arXiv 2306.01708; WARP: Rame et al. 2024, arXiv 2406.16768. Evidence: official code (TIES), the common tools
(SLERP), the definitions (soups, WARP, adapters). With task vectors tau_k = theta_k - theta_0:

    task arithmetic   theta_0 + scale sum_k tau_k    (0.3-0.4 for several tasks; a negative scale unlearns)
    soup              mean_k theta_k, or a weighted mean;   greedy soup: what does not lower the score joins
    WiSE-FT, EMA      (1 - a) theta_0 + a theta      (`dpo_jax.tree.interpolate`)
    TIES              trim each tau to its largest entries, elect a sign per entry, merge those that agree with it
    SLERP             sin((1-t) w)/sin(w) a + sin(t w)/sin(w) b,  w the angle between a and b
    WARP              theta_0 + eta SLERP(tau_1 .. tau_M), the next start; train each policy against an EMA of itself
    adapters          sum_k w_k A_k B_k, exactly by joining ranks, or cut to a rank by SVD

Shapes: trees of arrays with one structure; sums in float32, results in the dtype of the first tree (of the base). DARE
before a merge is `darex.dare` on the task vectors. With different norms TIES elects the signs of the longest,
so scale them first if their norms differ by more than a factor of three. Leave buffers out and tied weights in once.
Reduces to: the tuned model (one model, scale 1, density 1); the ends (SLERP at t = 0, 1; WARP with one policy, eta 1).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.lora import join_ranks
from dpo_jax.ops import require_between, safe_divide
from dpo_jax.types import Array, PyTree


class Soup(NamedTuple):
    """A greedy soup: the mean of the members (indices in the order they joined), and its score."""

    params: PyTree
    members: tuple[int, ...]
    score: float


class LowRank(NamedTuple):
    """An adapter of a kernel [..., in, out]: its delta is a @ b, the scale folded into either.

    Attributes:
      a: [..., in, rank].
      b: [..., rank, out].
    """

    a: Array
    b: Array


def task_vector(tuned: PyTree, base: PyTree) -> PyTree:
    """tuned - base, a tree of float32 arrays."""
    return jax.tree.map(lambda t, b: t.astype(jnp.float32) - b.astype(jnp.float32), tuned, base)


def apply_task_vector(base: PyTree, vector: PyTree, *, scale: float = 1.0) -> PyTree:
    """base + scale * vector, summed in float32, in the dtypes of base."""
    return jax.tree.map(
        lambda b, v: (b.astype(jnp.float32) + scale * v.astype(jnp.float32)).astype(b.dtype), base, vector
    )


def weighted_sum(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """sum_k w_k tree_k of models or task vectors, summed in float32, in the dtypes of the first.

    Raises ValueError unless there is one weight per tree, and at least one.
    """
    if not trees or len(trees) != len(weights):
        raise ValueError(f"{len(trees)} trees and {len(weights)} weights; give one weight per tree, and a tree")

    def add(*leaves: Array) -> Array:
        total = sum(w * leaf.astype(jnp.float32) for w, leaf in zip(weights, leaves))
        return jnp.asarray(total).astype(leaves[0].dtype)

    return jax.tree.map(add, *trees)


def weighted_mean(trees: Sequence[PyTree], weights: Sequence[float] | None = None) -> PyTree:
    """sum_k w_k tree_k / sum_k w_k; the uniform soup by default. ValueError if the weights sum to zero."""
    weights = [1.0] * len(trees) if weights is None else weights
    if trees and not abs(sum(weights)) > 0:
        raise ValueError(f"the weights {list(weights)} sum to {sum(weights)}; nothing to divide by")
    return weighted_sum(trees, [w / sum(weights) for w in weights])


def greedy_soup(trees: Sequence[PyTree], score: Callable[[PyTree], float]) -> Soup:
    """Models by descending score; each joins the uniform mean if that does not lower the mean's score; host.

    Args:
      trees: models, at least one (ValueError).
      score: model -> validation score, larger is better.
    """
    if not trees:
        raise ValueError("no models to make a soup of")
    scores = [float(score(tree)) for tree in trees]
    first, *others = sorted(range(len(trees)), key=lambda i: -scores[i])
    soup = Soup(trees[first], (first,), scores[first])
    for number in others:
        members = (*soup.members, number)
        params = weighted_mean([trees[i] for i in members])
        value = float(score(params))
        if value >= soup.score:
            soup = Soup(params, members, value)
    return soup


def slerp(a: PyTree, b: PyTree, t: float, *, threshold: float = 0.9995) -> PyTree:
    """Spherical interpolation of each tensor, from a at t = 0 to b at t = 1, in the dtypes of a.

    The directions are interpolated, the lengths are kept: equal norms stay. Tensors whose cosine is beyond +-threshold
    are interpolated linearly (opposite ones can cancel); a zero tensor counts as orthogonal to everything.

    Args:
      a, b: models or, better, task vectors.
      t: place between them, in [0, 1].
      threshold: largest absolute cosine that is taken as an angle, in [0, 1).
    """
    return jax.tree.map(lambda x, y: _mix(x, y, _slerp_weights([x], [y], t, threshold)), a, b)


def slerp_global(a: PyTree, b: PyTree, t: float, *, threshold: float = 0.9995) -> PyTree:
    """`slerp` with one angle for the whole model, all tensors flattened into one vector.

    Args:
      a, b: models or task vectors.
      t: place between them, in [0, 1].
      threshold: largest absolute cosine that is taken as an angle, in [0, 1).
    """
    weights = _slerp_weights(jax.tree.leaves(a), jax.tree.leaves(b), t, threshold)
    return jax.tree.map(lambda x, y: _mix(x, y, weights), a, b)


def warp_merge(start: PyTree, policies: Sequence[PyTree], *, eta: float = 0.3) -> PyTree:
    """The next start of WARP: the policies' task vectors by iterated SLERP (t = 1/m), drawn back towards the start.

    Before it, each policy is trained against its own moving average, `dpo_jax.tree.interpolate(average, policy, 0.01)`
    at each step. With three and more policies the order matters a little.

    Args:
      start: what the policies were trained from.
      policies: at least one (ValueError).
      eta: share of the merged task vector that is kept, in [0, 1].
    """
    require_between(0.0, 1.0, eta=eta)
    if not policies:
        raise ValueError("no policies to merge")
    merged = task_vector(policies[0], start)
    for number, policy in enumerate(policies[1:], 2):
        merged = slerp(merged, task_vector(policy, start), 1 / number)
    return apply_task_vector(start, merged, scale=eta)


def trim(vector: PyTree, *, density: float = 0.2) -> PyTree:
    """A task vector with its int(density n) largest entries over the whole model, the others zero; ties in order.

    The published notebook keeps one entry more.
    """
    require_between(0.0, 1.0, density=density)
    flat, restore = _flatten(vector)
    return restore(_keep_largest(flat, density))


def trim_tensors(vector: PyTree, *, density: float = 0.2) -> PyTree:
    """`trim` of each tensor by itself, as merging tools do: every layer keeps its share."""
    require_between(0.0, 1.0, density=density)
    return jax.tree.map(lambda leaf: _keep_largest(leaf.reshape(-1), density).reshape(leaf.shape), vector)


def agreeing_mean(values: Array, agrees: Array, weights: Array) -> Array:
    """Weighted mean over models [K, n] of the entries that agree, 0 where none does; [n]."""
    total = jnp.sum(weights[:, None] * agrees, axis=0)
    return jnp.sum(weights[:, None] * agrees * values, axis=0) / jnp.where(total > 0, total, 1.0)


def agreeing_sum(values: Array, agrees: Array, weights: Array) -> Array:
    """Weighted sum over models [K, n] of the entries that agree; [n]."""
    return jnp.sum(weights[:, None] * agrees * values, axis=0)


def agreeing_max(values: Array, agrees: Array, weights: Array) -> Array:
    """The largest weighted entry in magnitude over models [K, n] among those that agree; [n]."""
    candidates = weights[:, None] * agrees * values
    place = jnp.argmax(jnp.abs(candidates), axis=0)
    return jnp.take_along_axis(candidates, place[None], axis=0)[0]


def ties_merge(
    vectors: Sequence[PyTree],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    trimmed: Callable[..., PyTree] = trim,
    aggregate: Callable[[Array, Array, Array], Array] = agreeing_mean,
) -> PyTree:
    """TIES: trimmed task vectors, a sign elected per entry by their weighted sum, and what agrees with it merged.

    Entries whose sum is zero take the sign that the majority of the model has, positive if there is none.

    Args:
      vectors: task vectors, at least one (ValueError).
      density: share of entries that each keeps, in [0, 1].
      weights: one above 0 per vector, in the election and the merge; all 1 by default.
      trimmed: `trim` over the whole model, or `trim_tensors`.
      aggregate: `agreeing_mean`, `agreeing_sum` or `agreeing_max`.
    """
    weights = [1.0] * len(vectors) if weights is None else weights
    if not vectors or len(weights) != len(vectors) or not all(w > 0 and math.isfinite(w) for w in weights):
        raise ValueError(f"{len(vectors)} vectors with weights {list(weights)}; give one weight above 0 per vector")
    restore = _flatten(vectors[0])[1]
    values = jnp.stack([_flatten(trimmed(vector, density=density))[0] for vector in vectors])  # [K, n]
    shares = jnp.asarray(weights, jnp.float32)
    sign = jnp.sign(jnp.sum(shares[:, None] * values, axis=0))
    majority = jnp.where(jnp.sum(sign) < 0, -1.0, 1.0)
    sign = jnp.where(sign == 0, majority, sign)
    agrees = (jnp.sign(values) == sign).astype(jnp.float32)
    return restore(aggregate(values, agrees, shares))


def merge_lora_delta(adapters: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """sum_k w_k A_k B_k as full kernels, float32.

    Args:
      adapters: trees of `LowRank`, one structure; ranks may differ.
      weights: one per adapter (ValueError), of any sign.
    """
    joined = merge_lora_concat(adapters, weights)
    return jax.tree.map(_product, joined, is_leaf=_is_low_rank)


def merge_lora_concat(adapters: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """sum_k w_k A_k B_k without loss as one adapter whose rank is the sum of the ranks, float32.

    Args:
      adapters: trees of `LowRank`, one structure; ranks may differ.
      weights: one per adapter (ValueError), of any sign; folded into `b`.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights; give one weight per adapter, and one")
    return jax.tree.map(lambda *parts: LowRank(*join_ranks(parts, weights)), *adapters, is_leaf=_is_low_rank)


def merge_lora_svd(adapters: Sequence[PyTree], weights: Sequence[float], *, rank: int) -> PyTree:
    """The adapter of a given rank that is nearest to sum_k w_k A_k B_k, float32; singular values split evenly.

    Args:
      adapters: trees of `LowRank`, one structure; ranks may differ.
      weights: one per adapter (ValueError), of any sign.
      rank: at least 1 (ValueError); no more than the smaller side of a kernel is kept.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; give at least 1")

    def cut(joined: LowRank) -> LowRank:
        u, s, v = jnp.linalg.svd(_product(joined), full_matrices=False)  # [..., in, m], [..., m], [..., m, out]
        root = jnp.sqrt(s[..., :rank])
        return LowRank(u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :])

    return jax.tree.map(cut, merge_lora_concat(adapters, weights), is_leaf=_is_low_rank)


def _slerp_weights(a: Sequence[Array], b: Sequence[Array], t: float, threshold: float) -> tuple[Array, Array]:
    """Coefficients of a and of b, from one angle between all their entries."""
    require_between(0.0, 1.0, t=t)
    if not 0 <= threshold < 1:
        raise ValueError(
            f"threshold is {threshold}; give a number in [0, 1): an angle of zero has no sine to divide by"
        )
    a, b = (_unit_peak(side) for side in (a, b))
    squares = [sum(jnp.sum(jnp.square(x)) for x in side) for side in (a, b)]
    dot = sum(jnp.sum(x * y) for x, y in zip(a, b))
    cosine = safe_divide(jnp.asarray(dot), jnp.sqrt(squares[0] * squares[1]))
    straight = jnp.abs(cosine) > threshold
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    return (
        jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / jnp.sin(angle)),
        jnp.where(straight, t, jnp.sin(t * angle) / jnp.sin(angle)),
    )


def _unit_peak(leaves: Sequence[Array]) -> list[Array]:
    """In float32, with 1 as the largest magnitude of all: squares of very small or large ones would leave float32."""
    peak = jnp.max(jnp.stack([jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0) for x in leaves]))
    return [safe_divide(x.astype(jnp.float32), peak) for x in leaves]


def _mix(a: Array, b: Array, weights: tuple[Array, Array]) -> Array:
    return (weights[0] * a.astype(jnp.float32) + weights[1] * b.astype(jnp.float32)).astype(a.dtype)


def _flatten(tree: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """All entries as one float32 vector, and the way back to a tree of float32 arrays."""
    leaves, structure = jax.tree.flatten(tree)
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))

    def restore(flat: Array) -> PyTree:
        parts = jnp.split(flat, ends[:-1])
        return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)])

    return jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in leaves]), restore


def _keep_largest(flat: Array, density: float) -> Array:
    # 0.29 * 100 is 28.99... in binary.
    count = int(density * flat.size + 1e-9)
    kept = jnp.argsort(-jnp.abs(flat), stable=True)[:count]
    return jnp.zeros_like(flat, dtype=jnp.float32).at[kept].set(flat[kept].astype(jnp.float32))


def _product(adapter: LowRank) -> Array:
    return jnp.matmul(adapter.a, adapter.b, precision=jax.lax.Precision.HIGHEST)


def _is_low_rank(node: PyTree) -> bool:
    return isinstance(node, LowRank)
