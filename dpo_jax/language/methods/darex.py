"""DAREx: prune what fine-tuning added, rescale the rest so that little changes.

Deng, Zhao, Vakilian, Chen, Li, Thrampoulidis 2024, arXiv 2410.09344; DARE: Yu et al. 2023, arXiv 2311.03099. Evidence:
official code (DARE, q, the bound's q, output change, learned q, AdamR); our derivation (error moments, mean-square q);
the abstract (masks by input, magnitude and activation). With kernels W [in, out], delta = W_tuned - W_base, pruning
rate p, a keep mask m, inputs x and, per output i, c_j = delta_ji x_j, S1 = sum_j c_j, S2 = sum_j c_j^2:

    W = W_base + m delta / q         DARE: q = 1 - p;  DAREx-q: 1 - p < q <= 1, a bias for less variance
    error e = S1 - sum_j m_j c_j / q,   E e = (1 - (1-p)/q) S1,   Var e = p (1-p) / q^2 S2
    least mean square   q* = (1-p) + p sum S2 / sum S1^2   (sums over inputs and outputs that share q)
    bound (per output)  the q of a grid that minimises |eta (1 - (1-p)/q) S1 + eta^2 Phi(p) S2 / (4 q^2) + ln(2/gamma)|,
                        Phi(p) = (1-2p) / ln((1-p)/p)
    learned             q = |coefficient| + 1 - p
    AdamR               theta <- theta - lr wd/vbar (theta - theta_base) - lr mhat / (sqrt(vhat) + eps),
                        vbar = sqrt(mean of vhat over all parameters);  AdamR-L1: sign(theta - theta_base)

Deltas and masks are trees of arrays; select the leaves to prune with `dpo_jax.tree.partition` (attention and MLP
kernels: never embeddings, heads or norms). Leading axes of a kernel [..., in, out] are layers. A bias is one more row
of delta whose input is 1. Masks follow from a key and a tensor's path name alone: a stored seed brings them back.
With large deltas that training did not hold small, masks by importance (with q = 1) beat all random ones.
Reduces to: the tuned weights (p = 0, or full masks with q = 1); Adam (AdamR, weight_decay 0).
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import require_between, require_positive, safe_divide
from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import Array, PyTree

if TYPE_CHECKING:
    import optax


class ErrorMoments(NamedTuple):
    """Mean and variance over masks of the error of each output, [N, out] each."""

    mean: Array
    variance: Array


class SearchResult(NamedTuple):
    """The best place of a search, its score, and every (place, score) in the order of evaluation."""

    best: float
    score: float
    tried: list[tuple[float, float]]


class AdamRState(NamedTuple):
    """Steps done, both moments (float32), and the parameters that the decay pulls towards."""

    count: Array
    mu: PyTree
    nu: PyTree
    anchor: PyTree


def random_masks(delta: PyTree, key: Array, *, rate: float) -> PyTree:
    """Boolean masks of a tree that keep each entry with probability 1 - rate, another draw for every path name."""
    _require_rate(rate)
    return map_named(lambda name, leaf: jax.random.bernoulli(_fold_name(key, name), 1 - rate, leaf.shape), delta)


def input_masks(delta: PyTree, key: Array, *, rate: float) -> PyTree:
    """Boolean masks that keep or drop whole rows of kernels [..., in, out]: what one input says to all outputs.

    A vector (a bias, whose input is 1) is kept or dropped as a whole.
    """
    _require_rate(rate)

    def mask(name: str, leaf: Array) -> Array:
        keep = jax.random.bernoulli(_fold_name(key, name), 1 - rate, (*leaf.shape[:-1], 1))
        return jnp.broadcast_to(keep, leaf.shape)

    return map_named(mask, delta)


def magnitude_masks(delta: PyTree, *, rate: float) -> PyTree:
    """Boolean masks of the round((1 - rate) n) largest |delta| of each tensor (MagDiff), ties in memory order."""
    _require_rate(rate)
    return jax.tree.map(lambda leaf: _largest(jnp.abs(leaf).reshape(-1), rate).reshape(leaf.shape), delta)


def activation_masks(delta: PyTree, input_norms: PyTree, *, rate: float) -> PyTree:
    """Boolean masks of the round((1 - rate) in) largest |delta_ji| |x_j| of each output (as Wanda, arXiv 2306.11695).

    Args:
      delta: kernels [..., in, out].
      input_norms: a tree like delta of [..., in] root sums of squares of the activations that enter each kernel.
      rate: share to prune, in [0, 1).
    """
    _require_rate(rate)

    def mask(leaf: Array, norms: Array) -> Array:
        importance = jnp.abs(leaf) * norms[..., :, None]  # [..., in, out]
        return jnp.swapaxes(_largest(jnp.swapaxes(importance, -1, -2), rate), -1, -2)

    return jax.tree.map(mask, delta, input_norms)


def prune(delta: PyTree, masks: PyTree, *, q: float | Array | Mapping[str, float | Array] = 1.0) -> PyTree:
    """m delta / q, in float32.

    Args:
      delta: tree of arrays.
      masks: a tree like it, one where an entry is kept.
      q: one divisor for all, or path name -> divisor; names without one take the mean of the given.
    """
    if isinstance(q, Mapping):
        unknown = set(q) - set(named_leaves(delta))
        if unknown or not q:
            raise ValueError(f"q must name tensors of the delta; these are not: {sorted(unknown)}")
        average = sum(q.values()) / len(q)
    by_name = q if isinstance(q, Mapping) else {}
    common = average if isinstance(q, Mapping) else q

    def scaled(name: str, leaf: Array, mask: Array) -> Array:
        return jnp.where(mask, leaf.astype(jnp.float32), 0.0) / by_name.get(name, common)

    return map_named(scaled, delta, masks)


def dare(delta: PyTree, key: Array, *, rate: float = 0.9) -> PyTree:
    """DARE: entries dropped at random, the rest divided by 1 - rate; unbiased over keys. Float32."""
    return prune(delta, random_masks(delta, key, rate=rate), q=1 - rate)


def error_moments(delta: Array, inputs: Array, *, rate: float, q: float | Array) -> ErrorMoments:
    """Mean and variance over random masks of the error that pruning makes at each output, float32.

    Args:
      delta: [in, out].
      inputs: [N, in].
      rate: share to prune, in [0, 1).
      q: divisor of what is kept.
    """
    _require_rate(rate)
    first, second = _sums(delta, inputs)
    return ErrorMoments((1 - (1 - rate) / q) * first, rate * (1 - rate) / q**2 * second)


def mean_square_q(deltas: Sequence[Array], inputs: Sequence[Array], *, rate: float) -> Array:
    """The q with the least mean squared error over all outputs of the layers that share it, float32 scalar.

    At least 1 - rate; above 1 where outputs cancel (inf, dropping everything, where they all do): clip it if a
    shrunk delta is not wanted.

    Args:
      deltas: one [in, out] per layer.
      inputs: one [N, in] per layer, calibration activations.
      rate: share to prune, in [0, 1).
    """
    _require_rate(rate)
    sums = [_sums(delta, x) for delta, x in zip(deltas, inputs, strict=True)]
    square = sum((jnp.sum(jnp.square(first)) for first, _ in sums), jnp.zeros(()))
    second = sum((jnp.sum(second) for _, second in sums), jnp.zeros(()))
    ratio = jnp.where(square > 0, safe_divide(second, square), jnp.where(second > 0, jnp.inf, 0.0))
    return 1 - rate + jnp.where(rate > 0, rate * ratio, 0.0)


def kearns_saul(rate: float) -> float:
    """Phi(p) = (1 - 2p) / ln((1-p)/p), twice the sub-Gaussian variance bound of a Bernoulli; 1/2 at p = 1/2, host."""
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate}; give a number in (0, 1)")
    odds = math.log1p(-rate) - math.log(rate)
    return math.tanh(odds / 2) / odds if odds else 0.5


def bound_q(delta: np.ndarray, mean_input: np.ndarray, *, rate: float, eta: float, gamma: float = 0.05) -> float:
    """Divisor of a layer from the high-probability bound, without labels or masks; host, float64.

    The mean over outputs of the best place on the grid 0.001, 0.002, ... from 1 - rate to 0.998, ties to the larger.
    The published code keeps its running best in float16 and so stops early: an eta tuned there need not be good here.

    Args:
      delta: [in, out].
      mean_input: [in] mean activation, signed, over calibration tokens.
      rate: share to prune, in (0, 1).
      eta: the searched hyper-parameter, above 0.
      gamma: probability with which the bound may fail, above 0.
    """
    require_positive(eta=eta, gamma=gamma)
    phi = kearns_saul(rate)
    terms = np.asarray(delta, np.float64) * np.asarray(mean_input, np.float64)[:, None]  # [in, out]
    first, second = terms.sum(0), np.square(terms).sum(0)
    # 1000 (1 - 0.9) is 99.99... in binary.
    grid = 0.001 * np.arange(998, max(math.floor(1000 * (1 - rate) + 1e-9), 1) - 1, -1)  # descending
    if not len(grid):
        raise ValueError(f"rate is {rate}; the grid of q ends at 0.998, give a rate above 0.002")
    bias = eta * (1 - (1 - rate) / grid) * first[:, None]  # [out, grid]
    spread = eta**2 * phi * second[:, None] / (4 * grid**2)
    best = np.argmin(np.abs(bias + spread + math.log(2 / gamma)), axis=1)
    return float(grid[best].mean())


def initial_coefficients(delta: PyTree) -> dict[str, Array]:
    """Path name -> 1e-4: where the learned q of every tensor starts."""
    return {name: jnp.float32(1e-4) for name in named_leaves(delta)}


def learned_q(coefficients: Mapping[str, Array], *, rate: float) -> dict[str, Array]:
    """Path name -> |coefficient| + 1 - rate, differentiable: train it through `prune` on `top_logits_error`."""
    _require_rate(rate)
    return {name: jnp.abs(value) + (1 - rate) for name, value in coefficients.items()}


def mean_change(pruned: Array, full: Array) -> Array:
    """Mean |pruned - full| over all entries of two models' outputs [..., D], float32 scalar; less is better."""
    return jnp.mean(jnp.abs(pruned.astype(jnp.float32) - full.astype(jnp.float32)))


def top_logits_error(pruned: Array, full: Array, *, k: int = 5) -> Array:
    """Mean squared error on the k largest logits of the full model, [..., V] both, float32 scalar; less is better."""
    if not 0 < k <= full.shape[-1]:
        raise ValueError(f"k is {k}; give a number of logits in [1, {full.shape[-1]}]")
    value, place = jax.lax.top_k(full.astype(jnp.float32), k)
    return jnp.mean(jnp.square(jnp.take_along_axis(pruned.astype(jnp.float32), place, axis=-1) - value))


def mean_without_farthest(scores: Sequence[float]) -> float:
    """Mean of the scores of several mask seeds without the one that is farthest from their mean (first of ties); host.

    One score is returned as it is; ValueError for none.
    """
    if not scores:
        raise ValueError("no scores: evaluate at least one mask seed")
    values = np.asarray(scores, np.float64)
    if len(values) == 1:
        return float(values[0])
    return float(np.delete(values, np.argmax(np.abs(values - values.mean()))).mean())


def search(
    score: Callable[[float], float],
    *,
    low: float,
    high: float,
    step: float = 0.05,
    decay: float = 0.1,
    patience: int = 3,
) -> SearchResult:
    """Largest score on a grid from low to high, then on one of step * decay around the best; host.

    Each scan ends after more than `patience` places in a row without a new best, so it finds the first hill.

    Args:
      score: q or eta -> what to maximise, e.g. minus a change of outputs.
      low, high: ends of the interval, both inside (ValueError if low > high).
      step: distance of the coarse grid, above 0.
      decay: ratio of the fine step to the coarse one, in (0, 1).
      patience: places without improvement that a scan bears, at least 0.
    """
    require_positive(step=step, decay=decay)
    if not (low <= high and decay < 1 and patience >= 0):
        raise ValueError(f"nothing to search: low {low}, high {high}, decay {decay}, patience {patience}")
    tried: list[tuple[float, float]] = []

    def scan(start: float, end: float, distance: float) -> None:
        best, waited = -math.inf, 0  # its own best: the fine scan begins on the slope below the coarse one's
        for number in range(math.floor((end - start) / distance + 1e-9) + 1):
            place = start + number * distance
            value = score(place)
            tried.append((place, value))
            best, waited = (value, 0) if value > best else (best, waited + 1)
            if waited > patience:
                return

    scan(low, high, step)
    centre = max(tried, key=lambda pair: pair[1])[0]
    scan(max(low, centre - step), min(high, centre + step), step * decay)
    return SearchResult(*max(tried, key=lambda pair: pair[1]), tried)


def adamr(
    learning_rate: float | Callable[[Array], Array],
    base_params: PyTree,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> "optax.GradientTransformation":
    """AdamR (L2): Adam with a decay towards the base parameters, an `optax.GradientTransformation`.

    The decay is divided by the root mean over all parameters of this step's second moment, so its strength does not
    depend on the scale of the gradients. `update` needs the parameters. The state keeps the base parameters.

    Args:
      learning_rate: a number, or a schedule of the number of steps done.
      base_params: what the decay pulls towards, a tree like the parameters.
      b1, b2: decay of the first and second moment.
      eps: added to the root of the second moment.
      weight_decay: strength of the pull, at least 0.
    """
    return _adamr(learning_rate, base_params, b1, b2, eps, weight_decay, pull=lambda gap: gap)


def adamr_l1(
    learning_rate: float | Callable[[Array], Array],
    base_params: PyTree,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> "optax.GradientTransformation":
    """`adamr` with the sign of the distance to the base parameters: every entry decays at one speed.

    Args:
      learning_rate: a number, or a schedule of the number of steps done.
      base_params: what the decay pulls towards, a tree like the parameters.
      b1, b2: decay of the first and second moment.
      eps: added to the root of the second moment.
      weight_decay: strength of the pull, at least 0.
    """
    return _adamr(learning_rate, base_params, b1, b2, eps, weight_decay, pull=jnp.sign)


def _adamr(
    learning_rate: float | Callable[[Array], Array],
    base_params: PyTree,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    pull: Callable[[Array], Array],
) -> "optax.GradientTransformation":
    import optax  # here and not above: importing a loss must not load it

    require_between(0.0, float("inf"), weight_decay=weight_decay, eps=eps)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"b1 is {b1} and b2 is {b2}; give numbers in [0, 1)")

    def init(params: PyTree) -> AdamRState:
        if jax.tree.structure(params) != jax.tree.structure(base_params):
            raise ValueError("base_params is not a tree like the parameters")
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        # In the state, not closed over: under jit a constant would be compiled in, and a mesh would not shard it.
        return AdamRState(jnp.zeros((), jnp.int32), zeros, zeros, jax.tree.map(jnp.asarray, base_params))

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple[PyTree, AdamRState]:
        if params is None:
            raise ValueError("adamr needs the parameters: update(grads, state, params)")
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, grads)
        count = state.count + 1
        first, second = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)
        leaves = jax.tree.leaves(nu)
        size = sum(leaf.size for leaf in leaves)
        mean = sum((jnp.sum(leaf) / size for leaf in leaves), jnp.zeros(())) / second
        scale = jnp.where(mean > 0, jnp.sqrt(mean), 1.0)  # without any gradient the decay has strength lr * wd
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def move(m: Array, v: Array, param: Array, anchor: Array) -> Array:
            gap = param.astype(jnp.float32) - anchor.astype(jnp.float32)
            adam = (m / first) / (jnp.sqrt(v / second) + eps)
            return (-rate * (weight_decay / scale * pull(gap) + adam)).astype(param.dtype)

        return jax.tree.map(move, mu, nu, params, state.anchor), AdamRState(count, mu, nu, state.anchor)

    return optax.GradientTransformation(init, update)


def _require_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; give the share to prune, in [0, 1)")


def _fold_name(key: Array, name: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _largest(values: Array, rate: float) -> Array:
    """Boolean [..., n]: the round((1 - rate) n) largest of the last axis, ties in order."""
    order = jnp.argsort(-values, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1) < round((1 - rate) * values.shape[-1])


def _sums(delta: Array, inputs: Array) -> tuple[Array, Array]:
    """S1 and S2, [N, out]."""
    delta, inputs = delta.astype(jnp.float32), inputs.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return (
        jnp.matmul(inputs, delta, precision=exact),
        jnp.matmul(jnp.square(inputs), jnp.square(delta), precision=exact),
    )
