"""Small operations that many losses share: masked reductions, stable links, batch means, what a completion contributes.

A batch may hold empty places: rows in which every mask is zero. Statistics over the batch leave them out (`present`).
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.types import Array

# The largest exponent handed to exp in a loss: e^80 = 5.5e34 leaves float32 room for sums and coefficients.
MAX_EXPONENT = 80.0
# The largest mean log-probability that log1mexp tells from 0: float32 has no probability between 1 - 6e-8 and 1.
MAX_LOG_PROBABILITY = -1e-6


def masked_sum(values: Array, mask: Array, axis: int = -1) -> Array:
    """Sum of the values where the mask is not zero, in float32.

    Args:
      values: [..., T], any float dtype; what stands behind a zero of the mask changes neither value nor gradient,
        not even inf or nan.
      mask: [..., T], zero or one (or a weight), any dtype; a constant, no gradient flows into it.
      axis: the axis to sum over.
    """
    mask = jax.lax.stop_gradient(mask.astype(jnp.float32))
    return jnp.sum(jnp.where(mask != 0, values.astype(jnp.float32), 0.0) * mask, axis=axis)


def masked_count(mask: Array, axis: int = -1) -> Array:
    """Sum of the mask in float32: the number of tokens it keeps, or their total weight. No gradient."""
    return jnp.sum(jax.lax.stop_gradient(mask.astype(jnp.float32)), axis=axis)


def masked_mean(values: Array, mask: Array, axis: int = -1) -> Array:
    """Mean of the values where the mask is not zero, in float32; zero where the mask is empty."""
    return safe_divide(masked_sum(values, mask, axis), masked_count(mask, axis))


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Quotient that is zero, with zero gradient, wherever the denominator is zero."""
    empty = denominator == 0
    # The denominator is replaced before the division: 0 * nan in the backward pass would reach the gradient.
    return jnp.where(empty, 0.0, numerator / jnp.where(empty, 1.0, denominator))


def logistic_loss(logits: Array) -> Array:
    """Negative log-sigmoid, -log sigma(x) = log(1 + e^-x), stable at any size of x."""
    return -jax.nn.log_sigmoid(logits)


def smoothed_logistic_loss(logits: Array, label_smoothing: float) -> Array:
    """Cross-entropy of sigma(x) to a label that is 1 with probability 1 - label_smoothing."""
    return (1 - label_smoothing) * logistic_loss(logits) + label_smoothing * logistic_loss(-logits)


def log1mexp(logp: Array) -> Array:
    """log(1 - e^x) for log-probabilities x, float32; x is taken as at most -1e-6, where the gradient ends."""
    x = jnp.minimum(logp.astype(jnp.float32), MAX_LOG_PROBABILITY)
    near_zero = x > -math.log(2.0)
    # Each branch gets arguments of its own half only: the gradient of the branch not taken would be inf * 0.
    right = jnp.log(-jnp.expm1(jnp.where(near_zero, x, -1.0)))
    left = jnp.log1p(-jnp.exp(jnp.where(near_zero, -1.0, x)))
    return jnp.where(near_zero, right, left)


def log_odds(logp: Array) -> Array:
    """log(p / (1 - p)) of a probability given by its logarithm, float32."""
    return logp.astype(jnp.float32) - log1mexp(logp)


def present(*masks: Array) -> Array:
    """Float32 [B]: one for rows that have a token in any of the masks [B, ...], zero for empty places of a batch."""
    return jnp.stack([(mask != 0).reshape(mask.shape[0], -1).any(-1) for mask in masks]).any(0).astype(jnp.float32)


def batch_mean(values: Array, there: Array) -> Array:
    """Mean of [B] values over the rows that are there (`present`), float32 scalar; zero if there is none."""
    return masked_mean(values, there)


def token_mean_nll(logps: Array, mask: Array) -> Array:
    """Negative log-likelihood, float32 [B], scaled so that its mean over rows with tokens is the batch's token mean.

    Long completions weigh more in it than short ones. The scale couples the rows of a batch.

    Args:
      logps: [B, T] log-probabilities of completion tokens.
      mask: [B, T], one at completion tokens.
    """
    length = masked_count(mask)
    return -safe_divide(masked_sum(logps, mask), batch_mean(length, present(mask)))


def kl_divergence(logits: Array, other_logits: Array) -> Array:
    """KL(p || q) in nats of the softmax p of some logits and q of others, [..., V] -> float32 [...].

    A word at -inf in p counts nothing; one at -inf in q alone makes it infinite.
    """
    chex.assert_equal_shape([logits, other_logits])
    log_p, log_q = (jax.nn.log_softmax(v.astype(jnp.float32), axis=-1) for v in (logits, other_logits))
    possible = jnp.isfinite(log_p)
    # 0 log 0 is 0: impossible words are replaced before the difference, which would be inf or nan there.
    gap = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * gap, axis=-1)


def cosine_similarity(a: Array, b: Array) -> Array:
    """Cosine of the angle between vectors [..., D], float32 [...]; zero if one of them is zero."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # Scaled by the largest entry first: squares of 1e20 leave float32.
    a, b = (safe_divide(v, jnp.max(jnp.abs(v), axis=-1, keepdims=True)) for v in (a, b))
    square = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return safe_divide(jnp.sum(a * b, axis=-1), jnp.sqrt(jnp.where(square == 0, 1.0, square)) * (square != 0))


class CompletionSums(NamedTuple):
    """What one completion contributes to most losses; every field float32, the shape of the mask less its last axis.

    Attributes:
      logps: sum of the policy's log-probabilities over the completion's tokens.
      log_ratio: log pi(y|x) / pi_ref(y|x), the (weighted) sum over tokens; that of `logps` if there is no reference.
      length: number of tokens |y|.
    """

    logps: Array
    log_ratio: Array
    length: Array

    @property
    def mean_logps(self) -> Array:
        """Mean log-probability of the completion's tokens; zero for an empty completion."""
        return safe_divide(self.logps, self.length)


def completion_sums(
    policy_logps: Array, reference_logps: Array | None, mask: Array, weights: Array | None = None
) -> CompletionSums:
    """Sums over the tokens of each completion, in float32 whatever the inputs are.

    The core of all token-weighted methods: `log_ratio` is sum_t w_t (log pi(y_t) - log pi_ref(y_t)).

    Args:
      policy_logps: [..., T] log-probability of each completion token.
      reference_logps: [..., T] the same under the reference, a constant (stop_gradient); None for a uniform reference.
      mask: [..., T], one at completion tokens.
      weights: [..., T] of the tokens in `log_ratio`, constants of any sign; all one by default. What stands behind the
        mask is not read.
    """
    chex.assert_equal_shape([policy_logps, mask])
    logps = masked_sum(policy_logps, mask)
    length = masked_count(mask)
    ratios = policy_logps.astype(jnp.float32)
    if reference_logps is not None:
        chex.assert_equal_shape([policy_logps, reference_logps])
        # Differences first, then the sum: two long sums of nearly equal size would cancel and lose the margin.
        ratios = ratios - jax.lax.stop_gradient(reference_logps.astype(jnp.float32))
    if weights is not None:
        chex.assert_equal_shape([policy_logps, weights])
        mask = jnp.where(mask != 0, mask * weights.astype(jnp.float32), 0.0)  # a constant: masked_sum stops it
    return CompletionSums(logps, masked_sum(ratios, mask), length)


def strict_pairs(labels: Array, there: Array) -> Array:
    """Float32 [..., K, K]: one where item i is labelled strictly above item j and both are there.

    Args:
      labels: [..., K].
      there: [..., K], zero at absent items.
    """
    labels, there = jax.lax.stop_gradient(labels.astype(jnp.float32)), there != 0
    above = labels[..., :, None] > labels[..., None, :]
    return (above & there[..., :, None] & there[..., None, :]).astype(jnp.float32)


class OrderedPairs(NamedTuple):
    """Sums over the pairs of each list whose labels differ, all float32 [B].

    Attributes:
      nll: -log sigma(s_i - s_j), label_i > label_j.
      gap: s_i - s_j.
      count: number of pairs.
      metrics: `margin` and `accuracy`, means over the pairs (accuracy counts strictly larger scores), and `pairs`.
    """

    nll: Array
    gap: Array
    count: Array
    metrics: dict[str, Array]


def ordered_pairs(scores: Array, labels: Array, there: Array) -> OrderedPairs:
    """Bradley-Terry on all pairs of a list.

    Args:
      scores: [B, K] rewards of the model; those of absent items are not read.
      labels: [B, K], the larger the better; equal ones make no pair.
      there: [B, K], zero at absent items.
    """
    chex.assert_equal_shape([scores, labels, there])
    pairs, scores = strict_pairs(labels, there), scores.astype(jnp.float32)  # [B, K, K]
    # Replaced before the loss: what stands at an absent item must not reach the gradient.
    gap = jnp.where(pairs != 0, scores[:, :, None] - scores[:, None, :], 0.0)
    count, total = jnp.sum(pairs, axis=(1, 2)), jnp.sum(gap, axis=(1, 2))
    right = jnp.sum(gap > 0, axis=(1, 2), dtype=jnp.float32)
    metrics = {"margin": safe_divide(total, count), "accuracy": safe_divide(right, count), "pairs": count}
    return OrderedPairs(jnp.sum(pairs * logistic_loss(gap), axis=(1, 2)), total, count, metrics)


def ranks(scores: Array, there: Array) -> Array:
    """1-based rank of each item by descending score, float32 [..., K]; absent items rank last, ties in list order."""
    scores = jnp.where(there != 0, jax.lax.stop_gradient(scores.astype(jnp.float32)), -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return 1.0 + jnp.argsort(order, axis=-1).astype(jnp.float32)


def lambda_weights(labels: Array, scores: Array, there: Array) -> Array:
    """LambdaLoss weight of every pair of items, float32 [..., K, K], a constant.

    |2^label_i - 2^label_j| |1/ln(1 + rank_i) - 1/ln(1 + rank_j)|, ranks by descending score (arXiv 2402.01878, eq. 9).

    Args:
      labels: [..., K] graded relevance, usually in [0, 1].
      scores: [..., K] what the model ranks by.
      there: [..., K], zero at absent items.
    """
    gain = jnp.exp2(jax.lax.stop_gradient(jnp.where(there != 0, labels.astype(jnp.float32), 0.0)))
    discount = 1.0 / jnp.log1p(ranks(scores, there))
    between = jnp.abs(gain[..., :, None] - gain[..., None, :]) * jnp.abs(
        discount[..., :, None] - discount[..., None, :]
    )
    return between * ((there != 0)[..., :, None] & (there != 0)[..., None, :])


def plackett_luce_nll(scores: Array, labels: Array, there: Array) -> Array:
    """Negative log-likelihood of the order of the labels under Plackett-Luce with the given scores, float32 [...].

    sum_k logsumexp_{j >= k} s_(j) - s_(k), (k) the item with the k-th largest label (ties in list order).

    Args:
      scores: [..., K], finite where there.
      labels: [..., K].
      there: [..., K], zero at absent items.
    """
    order = jnp.argsort(ranks(labels, there), axis=-1)
    there = jnp.take_along_axis(there != 0, order, axis=-1)  # absent ones are at the end now
    scores = jnp.take_along_axis(scores.astype(jnp.float32), order, axis=-1)
    low = jnp.finfo(jnp.float32).min
    after = jax.lax.cumlogsumexp(jnp.where(there, scores, low), axis=scores.ndim - 1, reverse=True)
    return jnp.sum(jnp.where(there, jnp.where(there, after, 0.0) - scores, 0.0), axis=-1)


def pair_metrics(
    chosen: CompletionSums, rejected: CompletionSums, chosen_reward: Array, rejected_reward: Array
) -> dict[str, Array]:
    """The metrics that every loss over pairs reports, each float32 [B].

    Args:
      chosen, rejected: sums of the two completions, fields [B].
      chosen_reward, rejected_reward: [B] implicit rewards of the method; accuracy counts strictly larger ones.
    """
    chex.assert_equal_shape([chosen.logps, rejected.logps, chosen_reward, rejected_reward])
    return {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": chosen_reward - rejected_reward,
        "accuracy": (chosen_reward > rejected_reward).astype(jnp.float32),
        "chosen_logps": chosen.logps,
        "rejected_logps": rejected.logps,
        "chosen_log_ratio": chosen.log_ratio,
        "rejected_log_ratio": rejected.log_ratio,
    }


def require_positive(**values: float) -> None:
    """Raise ValueError unless every hyper-parameter is a finite number above zero."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; give a finite number above 0")


def require_between(low: float, high: float, **values: float) -> None:
    """Raise ValueError unless every hyper-parameter lies in the closed interval [low, high] and is finite."""
    for name, value in values.items():
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; give a finite number in [{low:g}, {high:g}]")
