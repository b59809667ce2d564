"""Ranking accuracy: does the policy itself give the preferred answer more likelihood, and can it learn to?

Chen et al. 2024, arXiv 2405.19534. Evidence: the paper's text and official code. With S the sum over completion tokens,

    c  = S(log pi_ref(y_l)) - S(log pi_ref(y_w))    the reference's log ratio: how wrongly it ranks the pair
    R  = 1[S(log pi(y_w)) >= S(log pi(y_l))]        ranking; R~ with S / |y|; not the reward's 1[x > 0]
    R* = 1[-c + logit(alpha) / beta > 0]            of the perfect optimum, alpha the raters' share (corollary 3.3)
    R = 1  <=>  dpo loss <= softplus(-beta c)       flip threshold, theorem 4.1
    c <= 1/(2 tau), ipo loss <= (1/(2 tau) - c)^2  =>  R = 1;   c > 1/(2 tau), ipo loss = 0  =>  R = 0  (A.7)
    gamma_dpo  softplus(-beta (S(log pi(y_w)) - S(log pi(y_l)) + gamma c))          eq. 4, threshold at gamma c

Shapes: log-probabilities and masks [B, T], what is said of a pair [B], all float32. Functions of `reference_log_ratio`
take c of any shape, the length-normalised one too. R counts ties, R* and the reward's accuracy do not, as in the paper.
R favours short answers: report R~ next to it. The official code divides the two sequence log-probabilities for R*
where the formula subtracts them; here the formula is followed.
Reduces to: gamma_dpo is dpo at gamma = 1 and knows no reference at gamma = 0.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = gamma_dpo_loss(**pair, beta=0.5, gamma=0.5)  # c = 2, x = 0.5 (-3 + 4 + 1)
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f} {output.metrics['ranked'][0]:.0f}")
0.3133 1.00 1
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    completion_sums,
    logistic_loss,
    masked_mean,
    masked_sum,
    pair_metrics,
    require_between,
    require_positive,
    strict_pairs,
)
from dpo_jax.types import Array, LossOutput

PAPER_BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)


class IdealRange(NamedTuple):
    """Idealised ranking accuracy over several beta, each a float32 scalar."""

    low: Array
    median: Array
    high: Array


def gamma_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    gamma: float = 1.0,
) -> LossOutput:
    """DPO with the reference's say scaled, eq. 4: the probe of how much the reference holds back a right ranking.

    Rewards of the metrics are beta (log pi - gamma log pi_ref); `ranked` is R, `threshold` the loss at which R flips.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      gamma: share of the reference's log ratio that is kept, at least 0; 1 is DPO, 0 reference-free.
    """
    require_positive(beta=beta)
    require_between(0.0, float("inf"), gamma=gamma)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chosen_reward = beta * _scaled_log_ratio(policy_chosen_logps, reference_chosen_logps, chosen_mask, gamma)
    rejected_reward = beta * _scaled_log_ratio(policy_rejected_logps, reference_rejected_logps, rejected_mask, gamma)
    c = reference_log_ratio(
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
    )
    metrics = {
        **pair_metrics(chosen, rejected, chosen_reward, rejected_reward),
        "ranked": (chosen.logps >= rejected.logps).astype(jnp.float32),
        "threshold": flip_threshold(gamma * c, beta=beta),
    }
    return LossOutput(logistic_loss(chosen_reward - rejected_reward), metrics)


def ranking_metrics(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """Who ranks each pair rightly, and how far its DPO loss is from where the ranking flips; means are the accuracies.

    It has the form of a loss, so that `objectives.from_loss` and `train.make_eval_step` run it.

    Args:
      beta: of the DPO loss that the thresholds belong to, above 0.

    Returns:
      loss: the DPO loss [B]. Metrics [B], ones and zeros unless a unit is named: `ranked` (R), `ranked_per_token` (R~),
      the same of the reference (`reference_ranked`, ...), `reward_ranked`; the four groups `kept_right`, `kept_wrong`,
      `flipped_right`, `flipped_wrong` of reference and policy; `difficulty` (beta max(c, 0)), `threshold` (nats) and
      `excess_loss` (loss less threshold; at most 0 where R is 1).
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    reference = dict(
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
    )
    c = reference_log_ratio(**reference)
    loss = logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    threshold = flip_threshold(c, beta=beta)
    # Sums are compared, not losses: far from the boundary both losses round to the same number.
    right, reference_right = chosen.logps >= rejected.logps, c <= 0
    policy_gap = masked_mean(policy_chosen_logps, chosen_mask) - masked_mean(policy_rejected_logps, rejected_mask)
    metrics = {
        "ranked": right,
        "ranked_per_token": policy_gap >= 0,
        "reference_ranked": reference_right,
        "reference_ranked_per_token": reference_log_ratio_per_token(**reference) <= 0,
        "reward_ranked": chosen.log_ratio > rejected.log_ratio,
        "kept_right": reference_right & right,
        "kept_wrong": ~reference_right & ~right,
        "flipped_right": ~reference_right & right,
        "flipped_wrong": reference_right & ~right,
        "difficulty": difficulty(c, beta=beta),
        "threshold": threshold,
        "excess_loss": loss - threshold,
    }
    return LossOutput(loss, {name: value.astype(jnp.float32) for name, value in metrics.items()})


def reference_log_ratio(
    *, reference_chosen_logps: Array, reference_rejected_logps: Array, chosen_mask: Array, rejected_mask: Array
) -> Array:
    """c = S(log pi_ref(y_l)) - S(log pi_ref(y_w)), nats, float32 [B]; above 0 where the reference ranks wrongly.

    Args:
      reference_chosen_logps, reference_rejected_logps: [B, T] per token, constants.
      chosen_mask, rejected_mask: [B, T], one at completion tokens.
    """
    rejected = masked_sum(reference_rejected_logps, rejected_mask)
    return jax.lax.stop_gradient(rejected - masked_sum(reference_chosen_logps, chosen_mask))


def reference_log_ratio_per_token(
    *, reference_chosen_logps: Array, reference_rejected_logps: Array, chosen_mask: Array, rejected_mask: Array
) -> Array:
    """The same difference of means over tokens, for length-normalised accuracies, nats per token, float32 [B]."""
    rejected = masked_mean(reference_rejected_logps, rejected_mask)
    return jax.lax.stop_gradient(rejected - masked_mean(reference_chosen_logps, chosen_mask))


def ideal_log_ratio(reference_log_ratio: Array, agreement: Array, *, beta: float, eps: float = 1e-3) -> Array:
    """log pi*(y_w) / pi*(y_l) of the perfectly optimised policy, nats (theorem 3.1), the shape of the inputs.

    Args:
      reference_log_ratio: c, any shape.
      agreement: share of raters that prefer y_w, of the same shape or a scalar; clipped to [eps, 1 - eps].
      beta: strength of the KL constraint, above 0.
      eps: in (0, 0.5).
    """
    require_positive(beta=beta)
    return _logit(agreement, eps) / beta - reference_log_ratio


def idealized_ranking_accuracy(
    reference_log_ratio: Array, agreement: Array, *, beta: float, eps: float = 1e-3
) -> Array:
    """R*, the share of pairs that the perfectly optimised policy ranks strictly rightly, float32 scalar (cor. 3.3).

    R~* comes from the log ratio per token. The alignment gap is this less the policy's ranking accuracy.

    Args:
      reference_log_ratio: [N] c.
      agreement: [N] or scalar share of raters that prefer y_w (0.75 if unknown), clipped to [eps, 1 - eps].
      beta: strength of the KL constraint, above 0.
      eps: in (0, 0.5).
    """
    return jnp.mean((ideal_log_ratio(reference_log_ratio, agreement, beta=beta, eps=eps) > 0).astype(jnp.float32))


def idealized_ranking_range(
    reference_log_ratio: Array, agreement: Array, *, betas: Sequence[float] = PAPER_BETAS, eps: float = 1e-3
) -> IdealRange:
    """Least, median and largest R* over several beta, as the paper's tables report it."""
    values = [idealized_ranking_accuracy(reference_log_ratio, agreement, beta=beta, eps=eps) for beta in betas]
    stacked = jnp.stack(values)
    return IdealRange(jnp.min(stacked), jnp.median(stacked), jnp.max(stacked))


def max_beta_for_ideal(reference_log_ratio: Array, agreement: Array, *, eps: float = 1e-3) -> Array:
    """The beta below which the perfect optimum ranks a pair rightly, logit(alpha) / c; the shape of the inputs.

    Infinite if no beta is too large (the reference is right, or equal and most raters agree), 0 if none is right.
    """
    logit, c = _logit(agreement, eps), reference_log_ratio
    bound = jnp.maximum(logit / jnp.where(c > 0, c, 1.0), 0.0)
    unbounded = (c < 0) | ((c == 0) & (logit > 0))
    return jnp.where(unbounded, jnp.inf, jnp.where(c > 0, bound, 0.0))


def flip_threshold(reference_log_ratio: Array, *, beta: float) -> Array:
    """The DPO loss at and below which a pair is ranked rightly, softplus(-beta c), nats (theorem 4.1).

    Args:
      reference_log_ratio: c, any shape; gamma c for `gamma_dpo_loss`.
      beta: of the loss, above 0.
    """
    require_positive(beta=beta)
    return logistic_loss(beta * reference_log_ratio)


def ipo_flip_threshold(reference_log_ratio: Array, *, tau: float) -> Array:
    """The IPO loss at and below which a pair is surely ranked rightly, (1/(2 tau) - c)^2 (proposition A.7).

    -inf where c > 1/(2 tau): no loss is small enough, a loss of 0 means a wrong ranking.

    Args:
      reference_log_ratio: c, any shape.
      tau: of the loss (h - 1/(2 tau))^2, above 0.
    """
    require_positive(tau=tau)
    room = 1 / (2 * tau) - reference_log_ratio
    return jnp.where(room >= 0, jnp.square(room), -jnp.inf)


def difficulty(reference_log_ratio: Array, *, beta: float) -> Array:
    """Margin of implicit rewards that a pair needs before the policy ranks it rightly, beta max(c, 0)."""
    require_positive(beta=beta)
    return beta * jnp.maximum(reference_log_ratio, 0.0)


def ranked_lists(*, policy_logps: Array, mask: Array, scores: Array) -> Array:
    """One where the policy orders a whole list as the raters do, float32 [B] (definition A.8).

    Every item scored strictly above another must have at least its log-probability; items scored alike may stand in
    any order, and absent items do not count.

    Args:
      policy_logps: [B, K, T] per token.
      mask: [B, K, T], one at completion tokens, all zero for absent items.
      scores: [B, K], larger is better.
    """
    chex.assert_equal_shape([policy_logps, mask])
    logps = masked_sum(policy_logps, mask)  # [B, K, T] -> [B, K]
    above = strict_pairs(scores, (mask != 0).any(-1))
    wrong = above * (logps[:, :, None] < logps[:, None, :])
    return (wrong.sum((-2, -1)) == 0).astype(jnp.float32)


def _scaled_log_ratio(policy_logps: Array, reference_logps: Array, mask: Array, gamma: float) -> Array:
    """S(log pi - gamma log pi_ref), [B, T] -> [B]; token differences first, as in `ops.completion_sums`."""
    return completion_sums(policy_logps, gamma * reference_logps.astype(jnp.float32), mask).log_ratio


def _logit(agreement: Array, eps: float) -> Array:
    if not 0 < eps < 0.5:
        raise ValueError(f"eps is {eps}; give a number in (0, 0.5)")
    share = jnp.clip(jnp.asarray(agreement, jnp.float32), eps, 1 - eps)
    return jnp.log(share) - jnp.log1p(-share)
