"""Metrics of preference tuning: implicit rewards, divergences to the reference, sampling, calibration, texts.

Standard definitions; KL estimators after Schulman, "Approximating KL divergence" (2020); pass@k after Chen et al. 2021,
arXiv 2107.03374; Spearman's, Brier's and Cohen's statistics as usual. Evidence: standard definitions, official code.

    reward = beta S(log pi - log pi_ref),  margin = reward_w - reward_l,  displaced = 1[S(log pi - log pi_ref) < 0]
    log r = log pi_ref - log pi per token:   k1 = -log r,   k2 = (log r)^2 / 2,   k3 = r - 1 - log r
    pass@k = 1 - C(n-c, k) / C(n, k);   best of k of m = sum_i r_(i) C(i-1, k-1) / C(m, k)
    ECE = sum_bins |sum prob - sum label| / N

E_pi[k1] = E_pi[k3] = KL(pi || pi_ref), k2 is biased; k2 and k3 are never negative. As terms of a loss on fixed samples
their gradients by log pi are 1, log pi - log pi_ref and 1 - r: in expectation nothing, that of KL(pi || pi_ref) and
that of KL(pi_ref || pi).
Shapes: log-probabilities and masks [B, T], logits [..., V]; float32 on devices. Functions marked "host" are float64
NumPy over a whole evaluation set. Means are over examples: sums and counts are kept apart, added up over devices and
batches, and divided once. Rates of judged comparisons are in `win_rates`.

>>> import jax.numpy as jnp
>>> ones, half = jnp.ones((1, 2)), jnp.log(jnp.full((1, 2), 0.5))
>>> print(f"{kl_token_mean(k1_estimate(half, half - 0.5, ones), ones):.3f}")
0.500
>>> print(f"{pass_at_k(10, 3, k=1):.1f} {best_of_n([0.0, 1.0, 3.0], n=3)} {best_of_n_kl(4):.3f}")
0.3 3.0 0.636
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dpo_jax.ops import (
    completion_sums,
    masked_count,
    masked_mean,
    masked_sum,
    pair_metrics,
    present,
    require_positive,
    safe_divide,
)
from dpo_jax.types import Array

MAX_LOG_RATIO = 20.0  # k3 grows like exp(log r); e^20 is 5e8


class SumCount(NamedTuple):
    """A sum and the number of examples in it, float32 scalars: add up by `jax.tree.map(operator.add, ...)`."""

    total: Array
    count: Array


class Divergences(NamedTuple):
    """Exact distances of two distributions over the vocabulary, in nats but for `tv`; each float32 [...].

    Attributes:
      policy_to_reference: KL(pi || pi_ref).
      reference_to_policy: KL(pi_ref || pi).
      js: Jensen-Shannon divergence, at most log 2.
      tv: total variation, in [0, 1].
      entropy: of the policy.
    """

    policy_to_reference: Array
    reference_to_policy: Array
    js: Array
    tv: Array
    entropy: Array


class Calibration(NamedTuple):
    """How well probabilities match labels.

    Attributes:
      ece, mce, ace: gap of mean probability and mean label per bin: weighted by size, the largest, the plain mean over
        bins that are not empty.
      brier: mean squared difference.
      log_loss: mean cross-entropy in nats, probabilities kept 1e-15 from 0 and 1.
    """

    ece: float
    mce: float
    ace: float
    brier: float
    log_loss: float


class TextStatistics(NamedTuple):
    """Lengths are in characters; `length_std` has n - 1 degrees of freedom (nan for one text); shares are in [0, 1]."""

    length_mean: float
    length_median: float
    length_std: float
    empty_share: float
    truncated_share: float


# While training


def preference_metrics(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float,
) -> dict[str, SumCount]:
    """Sums over the examples of a batch of everything one watches while training; places without tokens left out.

    Next to the metrics of `ops.pair_metrics` (accuracy counts strictly positive margins): `accuracy_half_ties` (a tie
    counts one half, as where policy and reference are equal), `preference_prob` (sigma of the margin),
    `chosen_displaced` and `rejected_displaced` (log-probability below the reference's), log-probabilities per token,
    lengths in tokens. No gradient.

    Args:
      policy_chosen_logps, ..., rejected_mask: [B, T], the table's.
      beta: scale of the implicit reward, above 0.
    """
    require_positive(beta=beta)
    there = present(chosen_mask, rejected_mask)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    values = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    margin = values["margin"]
    values |= {
        "accuracy_half_ties": values["accuracy"] + 0.5 * (margin == 0),
        "preference_prob": jax.nn.sigmoid(margin),
        "chosen_displaced": (chosen.log_ratio < 0).astype(jnp.float32),
        "rejected_displaced": (rejected.log_ratio < 0).astype(jnp.float32),
        "chosen_logps_per_token": chosen.mean_logps,
        "rejected_logps_per_token": rejected.mean_logps,
        "chosen_length": chosen.length,
        "rejected_length": rejected.length,
    }
    count = masked_count(there)
    sums = {name: SumCount(masked_sum(value, there), count) for name, value in values.items()}
    return jax.lax.stop_gradient(sums)


def spearman(a: Array, b: Array, there: Array) -> Array:
    """Rank correlation, ties at their mean rank, float32 scalar; 0 if one side is constant.

    With margins and length differences |y_w| - |y_l| it is the length bias of a policy. Memory is B^2.

    Args:
      a, b: [B].
      there: [B], zero at rows to leave out.
    """
    chex.assert_equal_shape([a, b, there])
    a, b = (_centred_ranks(v, there) for v in (a, b))
    return safe_divide(jnp.sum(a * b), jnp.sqrt(jnp.sum(a * a)) * jnp.sqrt(jnp.sum(b * b)))


def _centred_ranks(values: Array, there: Array) -> Array:
    """Mean ranks less their mean, zero at rows left out, [B]."""
    there = (there != 0).astype(jnp.float32)
    above = (values[:, None] > values[None, :]) + 0.5 * (values[:, None] == values[None, :])
    rank = jnp.sum(jnp.where(there[None, :] != 0, above, 0.0), axis=1)
    return there * (rank - masked_mean(rank, there))


# KL to the reference, from samples of the policy


def k1_estimate(policy_logps: Array, reference_logps: Array, mask: Array) -> Array:
    """log pi - log pi_ref of each sampled token, nats, float32 [..., T], zero behind the mask; may be negative.

    Args:
      policy_logps: [..., T] of tokens that the policy sampled.
      reference_logps: [..., T], a constant.
      mask: [..., T], one at completion tokens.
    """
    chex.assert_equal_shape([policy_logps, reference_logps, mask])
    policy = jnp.where(mask != 0, policy_logps.astype(jnp.float32), 0.0)
    reference = jnp.where(mask != 0, reference_logps.astype(jnp.float32), 0.0)
    return policy - jax.lax.stop_gradient(reference)


def k2_estimate(policy_logps: Array, reference_logps: Array, mask: Array) -> Array:
    """Half the squared log ratio of each sampled token, as `k1_estimate`; biased, little variance."""
    return 0.5 * jnp.square(k1_estimate(policy_logps, reference_logps, mask))


def k3_estimate(policy_logps: Array, reference_logps: Array, mask: Array) -> Array:
    """r - 1 - log r of each sampled token, as `k1_estimate`; unbiased, log r clipped to [-20, 20]."""
    log_r = jnp.clip(-k1_estimate(policy_logps, reference_logps, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(log_r) - log_r


def kl_token_mean(values: Array, mask: Array) -> Array:
    """Mean over all tokens of a batch, nats per token, float32 scalar; long completions weigh more."""
    return masked_mean(values.reshape(-1), mask.reshape(-1))


def kl_sequence_mean(values: Array, mask: Array) -> Array:
    """Mean of the sums over each completion ("objective/kl"), nats, float32 scalar; empty completions left out."""
    return masked_mean(masked_sum(values, mask).reshape(-1), (mask != 0).any(-1).reshape(-1))


def exact_divergences(policy_logits: Array, reference_logits: Array) -> Divergences:
    """Divergences of two next-token distributions, computed in float32.

    Args:
      policy_logits, reference_logits: [..., V], unnormalised; -inf for a token that cannot occur.
    """
    chex.assert_equal_shape([policy_logits, reference_logits])
    log_p = jax.nn.log_softmax(policy_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(reference_logits.astype(jnp.float32))
    log_mean = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return Divergences(
        policy_to_reference=_expected_log_ratio(p, log_p, log_q),
        reference_to_policy=_expected_log_ratio(q, log_q, log_p),
        js=0.5 * (_expected_log_ratio(p, log_p, log_mean) + _expected_log_ratio(q, log_q, log_mean)),
        tv=0.5 * jnp.sum(jnp.abs(p - q), axis=-1),
        entropy=-_expected_log_ratio(p, log_p, jnp.zeros_like(log_p)),
    )


def _expected_log_ratio(p: Array, log_p: Array, log_q: Array) -> Array:
    """sum_v p (log p - log q), [..., V] -> [...]; 0 log 0 is 0, p log 0 infinite."""
    return jnp.sum(p * jnp.where(p > 0, jnp.where(p > 0, log_p, 0.0) - log_q, 0.0), axis=-1)


# Sampling


def pass_at_k(samples: ArrayLike, correct: ArrayLike, *, k: int) -> np.ndarray:
    """Unbiased chance that one of k samples is right, float64, the shape of the inputs. Host.

    Args:
      samples: number n of samples drawn for each prompt, any shape.
      correct: number c of right ones, in [0, n].
      k: at most the smallest n.

    Raises:
      ValueError: k is below 1 or above n, or c outside [0, n].
    """
    n, c = np.broadcast_arrays(np.asarray(samples, np.float64), np.asarray(correct, np.float64))
    if k < 1 or np.any(n < k):
        raise ValueError(f"k is {k}; give a number from 1 to the number of samples, at least {n.min():g} here")
    if np.any((c < 0) | (c > n)):
        raise ValueError(f"between {c.min():g} and {c.max():g} of {n.min():g} or more samples are right")
    drawn = np.arange(k)
    # C(n-c, k) / C(n, k), a product of small ratios where the factorials would overflow.
    all_wrong = np.prod(np.maximum(n[..., None] - c[..., None] - drawn, 0.0) / (n[..., None] - drawn), axis=-1)
    return 1.0 - all_wrong


def best_of_n(rewards: ArrayLike, *, n: int) -> np.ndarray:
    """Unbiased expected reward of the best of n, from m >= n samples, float64 [...]. Host.

    Args:
      rewards: [..., m].
      n: n = 1 gives the mean, n = m the largest.

    Raises:
      ValueError: n is below 1 or above m.
    """
    ordered = np.sort(np.asarray(rewards, np.float64), axis=-1)
    m = ordered.shape[-1]
    if not 1 <= n <= m:
        raise ValueError(f"n is {n}; give a number from 1 to the {m} samples")
    weights = np.zeros(m)
    weights[-1] = n / m
    for i in range(m - 1, n - 1, -1):  # C(i-1, n-1) from C(i, n-1)
        weights[i - 1] = weights[i] * (i - n + 1) / i
    return ordered @ weights


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n sampling to the sampler, log n - (n-1)/n nats: exact without ties, else an upper bound. Host."""
    if n < 1:
        raise ValueError(f"n is {n}; give at least 1")
    return float(np.log(n) - (n - 1) / n)


def bandit_regret(rewards: Array, probs: Array) -> Array:
    """Best reward less the policy's expected one, max_a r - sum_a pi_a r_a, float32 [...].

    Args:
      rewards: [..., A].
      probs: [..., A], summing to 1.
    """
    chex.assert_equal_shape([rewards, probs])
    rewards = rewards.astype(jnp.float32)
    return jnp.max(rewards, axis=-1) - jnp.sum(rewards * probs, axis=-1)


# Calibration


def calibration(probs: ArrayLike, labels: ArrayLike, *, bins: int = 10) -> Calibration:
    """Calibration errors over bins of equal width, Brier score and log loss. Host.

    For a reward model prob = sigma(r_1 - r_2) with the answers in random order: with the preferred one always first
    every label is 1 and the errors only say how sure the model is.

    Args:
      probs: [N] in [0, 1].
      labels: [N] in [0, 1], shares of raters allowed.
      bins: a value on an edge belongs to the lower bin.

    Raises:
      ValueError: no values, shapes that differ, values outside [0, 1], bins below 1.
    """
    p, y = np.asarray(probs, np.float64).ravel(), np.asarray(labels, np.float64).ravel()
    if p.size == 0 or p.shape != y.shape or bins < 1:
        raise ValueError(f"{p.size} probabilities, {y.size} labels, {bins} bins; give as many of both, at least one")
    if not np.all((p >= 0) & (p <= 1) & (y >= 0) & (y <= 1)):
        raise ValueError("probabilities and labels must lie in [0, 1]")
    index = np.searchsorted(np.linspace(0.0, 1.0, bins + 1)[1:-1], p, side="left")
    size = np.bincount(index, minlength=bins)
    gap = np.abs(np.bincount(index, p - y, minlength=bins))
    mean_gap = gap[size > 0] / size[size > 0]
    clipped = np.clip(p, 1e-15, 1 - 1e-15)
    log_loss = -np.mean(y * np.log(clipped) + (1 - y) * np.log1p(-clipped))
    return Calibration(
        ece=float(gap.sum() / p.size),
        mce=float(mean_gap.max()),
        ace=float(mean_gap.mean()),
        brier=float(np.mean(np.square(p - y))),
        log_loss=float(log_loss),
    )


# Texts


def text_statistics(texts: Sequence[str], truncated: Sequence[bool] | None = None) -> TextStatistics:
    """Lengths of texts, and the shares that are blank or cut off. Host.

    Args:
      texts: at least one.
      truncated: one per text, true where generation stopped without an end token; all false by default.

    Raises:
      ValueError: no texts, or another number of `truncated`.
    """
    truncated = [False] * len(texts) if truncated is None else truncated
    if not texts or len(truncated) != len(texts):
        raise ValueError(f"{len(texts)} texts and {len(truncated)} marks of truncation; give as many of both")
    lengths = np.array([len(text) for text in texts], np.float64)
    return TextStatistics(
        length_mean=float(lengths.mean()),
        length_median=float(np.median(lengths)),
        length_std=float(lengths.std(ddof=1)) if len(texts) > 1 else float("nan"),
        empty_share=float(np.mean([not text.strip() for text in texts])),
        truncated_share=float(np.mean([bool(cut) for cut in truncated])),
    )


def distinct_n(texts: Sequence[str], *, n: int) -> float:
    """Unique n-grams of words over all n-grams of a set of texts, in [0, 1]; 0 if there are none. Host."""
    grams = [gram for text in texts for gram in _n_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], *, n: int) -> float:
    """Mean over texts of the share of n-grams that repeat an earlier one of the same text, in [0, 1). Host."""
    shares = [1 - len(set(grams)) / len(grams) for grams in (_n_grams(text, n) for text in texts) if grams]
    return float(np.mean(shares)) if shares else 0.0


def _n_grams(text: str, n: int) -> list[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}; give at least 1")
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
