"""SPPO: self-play towards the Nash policy, as a regression of each log ratio on its own win probability.

Wu et al. 2024, arXiv 2405.00675. Evidence: official code (soft and single losses, targets, hyper-parameters), other
libraries (hard). With u = log pi(y_w) / pi_t(y_w), v likewise for y_l, pi_t the policy of the last round (the
reference), eta = 1 / beta, and p the probability to beat an answer of pi_t,

    sppo         1/2 [(u - eta (p_w - 1/2))^2 + (v - eta (p_l - 1/2))^2]
    sppo_single  the same with p_w = P(y_w > y_l) and p_l = 1 - p_w
    sppo_hard    (u - eta/2)^2 + (v + eta/2)^2              p_w = 1, p_l = 0 and no factor 1/2

The exact step pi_{t+1} ~ pi_t exp(eta P(y > pi_t)) has its partition function replaced by exp(eta / 2). Unlike in DPO
each answer's own log ratio is fixed, not only their difference, and beta is near 1e-3: targets reach 500 nats and
losses 1e5, so the learning rate is small (5e-7 in the paper's runs).

Shapes: log-probabilities [B, T], masks [B, T], win probabilities and label_prob columns [B]; every result [B] float32.
Reference, columns and masks are constants. Options out of their range raise ValueError.
Reduces to: 0 for ties at the reference; hard = 2 single at P = 1.
Metrics: rewards beta times the log ratio, margin, strict accuracy, log-probabilities and log ratios.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0]]), reference_chosen_logps=jnp.array([[-2.0]]),
...             policy_rejected_logps=jnp.array([[-3.0]]), reference_rejected_logps=jnp.array([[-3.0]]),
...             chosen_mask=jnp.array([[1]]), rejected_mask=jnp.array([[1]]))
>>> # log ratios u = 1, v = 0
>>> wins = dict(chosen_win_prob=jnp.array([0.75]), rejected_win_prob=jnp.array([0.25]))
>>> f"{sppo_loss(**pair, **wins, beta=0.25).loss[0]:.2f} {sppo_hard_loss(**pair, beta=0.25).loss[0]:.2f}"
'0.50 5.00'
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    CompletionSums,
    completion_sums,
    masked_mean,
    pair_metrics,
    ranks,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


def sppo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    chosen_win_prob: Array,
    rejected_win_prob: Array,
    beta: float = 0.001,
) -> LossOutput:
    """SPPO with the estimated probability of each answer to beat the last policy (columns, `sppo_targets`).

    Args:
      beta: 1 / eta, the inverse step of the game, above 0; not comparable with DPO's.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _regression(chosen, rejected, chosen_win_prob, rejected_win_prob, beta, factor=0.5)


def sppo_single_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    label_prob: Array,
    beta: float = 0.001,
) -> LossOutput:
    """SPPO with one probability per pair: the column `label_prob` [B], that the chosen answer beats the rejected one.

    Args:
      beta: 1 / eta, the inverse step of the game, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    return _regression(chosen, rejected, label_prob, 1 - label_prob.astype(jnp.float32), beta, factor=0.5)


def sppo_hard_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.001,
) -> LossOutput:
    """SPPO with sure winners and losers, twice `sppo_single_loss` at probability 1 as other libraries have it.

    Args:
      beta: 1 / eta, the inverse step of the game, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    sure = jnp.ones_like(chosen.log_ratio)
    return _regression(chosen, rejected, sure, 0 * sure, beta, factor=1.0)


class WinProbabilities(NamedTuple):
    """Preferences among n answers to a prompt, float32.

    Attributes:
      pair: [..., n, n] probability that answer i beats answer j; 1/2 on the diagonal, 0 where one is absent.
      win: [..., n] probability to beat a random one of the answers, itself included; 0 where absent.
    """

    pair: Array
    win: Array


def win_probabilities(scores: Array, there: Array) -> WinProbabilities:
    """Bradley-Terry preferences of a ranker's scores, and each answer's chance against the policy that wrote them.

    The official estimate counts the comparison with itself: without it p becomes 1/2 + (p - 1/2) n / (n - 1).

    Args:
      scores: [..., n] of a pairwise ranker or reward model.
      there: [..., n], zero at absent answers, whose scores are not read.
    """
    chex.assert_equal_shape([scores, there])
    there = (there != 0).astype(jnp.float32)
    scores = jnp.where(there != 0, scores.astype(jnp.float32), 0.0)
    both = there[..., :, None] * there[..., None, :]
    pair = both * jax.nn.sigmoid(scores[..., :, None] - scores[..., None, :])
    return WinProbabilities(pair, there * masked_mean(pair, both))


class SppoTargets(NamedTuple):
    """A pair per prompt and the columns of the losses; every field [...].

    Attributes:
      chosen, rejected: int32 index of the answer with the largest and with the smallest score.
      chosen_win_prob, rejected_win_prob: float32, columns of `sppo_loss`.
      label_prob: float32, column of `sppo_single_loss`.
      keep: float32, zero where all scores are equal or fewer than two answers are there: such a prompt has no pair.
    """

    chosen: Array
    rejected: Array
    chosen_win_prob: Array
    rejected_win_prob: Array
    label_prob: Array
    keep: Array


def sppo_targets(scores: Array, there: Array) -> SppoTargets:
    """Best and worst of n sampled answers with their win probabilities; among equals the first.

    Args:
      scores: [..., n] of a pairwise ranker or reward model.
      there: [..., n], zero at absent answers, whose scores are not read.
    """
    pair, win = win_probabilities(scores, there)
    chosen = jnp.argmin(ranks(scores, there), axis=-1).astype(jnp.int32)
    rejected = jnp.argmin(ranks(-scores, there), axis=-1).astype(jnp.int32)

    def pick(values: Array, index: Array) -> Array:
        return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]

    there = jnp.where(there != 0, 1.0, 0.0)
    row = jnp.take_along_axis(pair, chosen[..., None, None], axis=-2)[..., 0, :]  # [..., n, n] -> [..., n]
    best, worst = pick(scores, chosen), pick(scores, rejected)
    keep = (pick(there, chosen) != 0) & (best > worst)
    return SppoTargets(
        chosen, rejected, pick(win, chosen), pick(win, rejected), pick(row, rejected), keep.astype(jnp.float32)
    )


def sppo_exact_step(log_probs: Array, preference: Array, *, eta: float) -> Array:
    """One step of the game on a table, with the exact partition function: float32 [..., Y], normalised.

    log pi_{t+1}(y) = log pi_t(y) + eta P(y > pi_t) - log Z (eq. 3).

    Args:
      log_probs: [..., Y] of the policy over all Y answers.
      preference: [..., Y, Y] probability that the row's answer beats the column's.
      eta: step, above 0.
    """
    require_positive(eta=eta)
    log_probs = log_probs.astype(jnp.float32)
    win = jnp.sum(preference * jax.nn.softmax(log_probs)[..., None, :], axis=-1)
    return jax.nn.log_softmax(log_probs + eta * win)


def _regression(
    chosen: CompletionSums, rejected: CompletionSums, win: Array, lose: Array, beta: float, factor: float
) -> LossOutput:
    """factor times the squared distance of both log ratios from (p - 1/2) / beta."""
    require_positive(beta=beta)
    u, v = chosen.log_ratio, rejected.log_ratio
    win, lose = (jax.lax.stop_gradient(p.astype(jnp.float32)) for p in (win, lose))
    loss = factor * (jnp.square(u - (win - 0.5) / beta) + jnp.square(v - (lose - 0.5) / beta))
    return LossOutput(loss, pair_metrics(chosen, rejected, beta * u, beta * v))
