"""Reward models: a scalar score of an answer, fitted to pairs, soft labels, graded lists or ties.

Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155 (pairs of a list); Touvron et al. 2023, arXiv 2307.09288
(margin); Eisenstein et al. 2023, arXiv 2312.09244 (centring). Evidence: other libraries (pairs, margin, centring,
pooling), the APO authors' code (lists, calibration), standard definitions (Rao and Kupper 1967, Davidson 1970). With
d = r_w - r_l,

    bradley_terry          (1-e) softplus(-d) + e softplus(d) + center_coef (r_w + r_l)^2
    bradley_terry_margin   softplus(-(d - m))
    bradley_terry_soft     q softplus(-d) + (1-q) softplus(d)
    rao_kupper             P(win) = sigma(d - log nu), P(lose) = sigma(-d - log nu), P(tie) = (nu^2 - 1) P(win) P(lose)
    davidson               softmax over (d/2, -d/2, log nu) for win, lose, tie
    reward_pairs           mean of softplus(-(r_i - r_j)) over all pairs of the batch with score_i > score_j
    reward_prompt_pairs    the same, averaged inside each list first
    reward_plackett_luce   sum_k logsumexp_{j >= k} r_(j) - r_(k),  (k) the item with the k-th best score

Shapes: rewards and columns of pairs [B]; of lists [B, K] with masks [B, K, T] that say which items are there. Every
result [B] float32. Columns and masks are constants. Options out of their range raise ValueError.
Reduces to: log 2 at equal rewards; lists of two to bradley_terry; rao_kupper at nu -> 1 and davidson at nu -> 0 to it.
Metrics: rewards of both sides, margin, strict accuracy; a margin asked for in the loss is not in them.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_reward=jnp.array([2.0]), policy_rejected_reward=jnp.array([0.5]))
>>> f"{bradley_terry_loss(**pair).loss[0]:.4f}"  # d = 1.5
'0.2014'
>>> f"{bradley_terry_margin_loss(**pair, margin=jnp.array([1.5])).loss[0]:.4f}"  # log 2
'0.6931'
"""

import math

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    batch_mean,
    logistic_loss,
    ordered_pairs,
    plackett_luce_nll,
    present,
    require_between,
    require_positive,
    safe_divide,
    smoothed_logistic_loss,
)
from dpo_jax.types import Array, LossOutput


def bradley_terry_loss(
    *,
    policy_chosen_reward: Array,
    policy_rejected_reward: Array,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
) -> LossOutput:
    """Cross-entropy of the Bradley-Terry model, with label smoothing and a pull of the mean reward to zero.

    Args:
      label_smoothing: probability e that a label is flipped, in [0, 1/2].
      center_coef: weight of (r_w + r_l)^2, which fixes the offset that pairs leave open; at least 0, 0.01 when used.
    """
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    require_between(0.0, math.inf, center_coef=center_coef)
    chosen, rejected = _pair(policy_chosen_reward, policy_rejected_reward)
    loss = smoothed_logistic_loss(chosen - rejected, label_smoothing) + center_coef * jnp.square(chosen + rejected)
    return LossOutput(loss, _pair_metrics(chosen, rejected))


def bradley_terry_margin_loss(
    *, policy_chosen_reward: Array, policy_rejected_reward: Array, margin: Array
) -> LossOutput:
    """Bradley-Terry that asks for a gap: the loss is log 2 where the rewards differ by the column `margin` [B]."""
    chosen, rejected = _pair(policy_chosen_reward, policy_rejected_reward)
    margin = jax.lax.stop_gradient(margin.astype(jnp.float32))
    return LossOutput(logistic_loss(chosen - rejected - margin), _pair_metrics(chosen, rejected))


def bradley_terry_soft_loss(
    *, policy_chosen_reward: Array, policy_rejected_reward: Array, label_prob: Array
) -> LossOutput:
    """Cross-entropy to the share of annotators, column `label_prob` [B], that preferred the chosen answer."""
    chosen, rejected = _pair(policy_chosen_reward, policy_rejected_reward)
    q = jax.lax.stop_gradient(label_prob.astype(jnp.float32))
    loss = q * logistic_loss(chosen - rejected) + (1 - q) * logistic_loss(rejected - chosen)
    return LossOutput(loss, _pair_metrics(chosen, rejected))


def rao_kupper_loss(
    *, policy_chosen_reward: Array, policy_rejected_reward: Array, is_tie: Array, nu: float = 2.0
) -> LossOutput:
    """Rao-Kupper model of wins and ties: a judge sees a difference only beyond the threshold log nu.

    The column `is_tie` [B] int is 1 where neither answer won, 0 where the chosen one did.

    Args:
      nu: threshold, above 1; at equal rewards ties have probability (nu - 1) / (nu + 1).
    """
    require_positive(nu=nu)
    if not nu > 1:
        raise ValueError(f"nu is {nu}; give a number above 1: ties have probability 0 at 1")
    chosen, rejected = _pair(policy_chosen_reward, policy_rejected_reward)
    threshold = math.log(nu)
    win = logistic_loss(chosen - rejected - threshold)
    lose = logistic_loss(rejected - chosen - threshold)
    tie = win + lose - math.log(math.expm1(2 * threshold))
    return LossOutput(jnp.where(is_tie != 0, tie, win), _pair_metrics(chosen, rejected))


def davidson_loss(
    *, policy_chosen_reward: Array, policy_rejected_reward: Array, is_tie: Array, nu: float = 1.0
) -> LossOutput:
    """Davidson model of wins and ties: a tie competes with strength nu times the geometric mean of the two.

    The column `is_tie` [B] int is 1 where neither answer won, 0 where the chosen one did.

    Args:
      nu: strength of ties, above 0; at equal rewards they have probability nu / (nu + 2).
    """
    require_positive(nu=nu)
    chosen, rejected = _pair(policy_chosen_reward, policy_rejected_reward)
    half = (chosen - rejected) / 2
    tie = jnp.full_like(half, math.log(nu))
    normaliser = jax.nn.logsumexp(jnp.stack([half, -half, tie]), axis=0)
    return LossOutput(normaliser - jnp.where(is_tie != 0, tie, half), _pair_metrics(chosen, rejected))


def reward_pairs_loss(*, policy_reward: Array, mask: Array, scores: Array) -> LossOutput:
    """Bradley-Terry on all ordered pairs of each list, every pair of the batch with the same weight.

    This loss is batch-coupled: rows are scaled by the number of pairs per list in the batch, so lists with many
    different scores weigh more, and microbatches change the scale. Ties and absent items make no pair.
    """
    pairs = ordered_pairs(policy_reward, scores, _items(mask))
    return LossOutput(safe_divide(pairs.nll, batch_mean(pairs.count, present(mask))), pairs.metrics)


def reward_prompt_pairs_loss(*, policy_reward: Array, mask: Array, scores: Array) -> LossOutput:
    """Bradley-Terry on all ordered pairs of each list, averaged inside the list (InstructGPT, arXiv 2203.02155, eq. 1).

    A list without a pair has loss 0.
    """
    pairs = ordered_pairs(policy_reward, scores, _items(mask))
    return LossOutput(safe_divide(pairs.nll, pairs.count), pairs.metrics)


def reward_plackett_luce_loss(*, policy_reward: Array, mask: Array, scores: Array) -> LossOutput:
    """Negative log-likelihood of the order of the scores; equal scores count in list order, absent items not at all."""
    there = _items(mask)
    metrics = ordered_pairs(policy_reward, scores, there).metrics
    rewards = jnp.where(there, policy_reward.astype(jnp.float32), 0.0)
    return LossOutput(plackett_luce_nll(rewards, jax.lax.stop_gradient(scores), there), metrics)


def pool_last(hidden: Array, mask: Array) -> Array:
    """Hidden state at the last token that the mask keeps, whatever side the padding is on.

    Args:
      hidden: [..., T, D] states of the last layer, any float dtype.
      mask: [..., T], not zero at real tokens. The index comes from it, so a padding id equal to EOS does no harm.

    Returns:
      [..., D] in the dtype of `hidden`; zeros where the mask is empty.
    """
    chex.assert_equal_shape_prefix([hidden, mask], mask.ndim)
    there = mask != 0
    last = mask.shape[-1] - 1 - jnp.argmax(there[..., ::-1], axis=-1)  # [...]
    state = jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]  # [..., T, D] -> [..., D]
    return jnp.where(there.any(-1)[..., None], state, 0).astype(hidden.dtype)


def expected_calibration_error(confidence: Array, correct: Array, *, bins: int = 10) -> Array:
    """Mean distance between stated confidence and observed accuracy over equal bins, float32 scalar in [0, 1].

    Of a reward model on pairs: confidence sigma(|r_w - r_l|), correct r_w > r_l. sum_b n_b / N |accuracy_b - mean
    confidence_b|; no bin counts that holds nothing, and the error of no pairs is 0.

    Args:
      confidence: [N] probabilities.
      correct: [N], one where the predicted event happened, zero where not.
      bins: number of equal bins, at least 1; the last one includes 1.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least 1")
    chex.assert_equal_shape([confidence, correct])
    confidence = confidence.astype(jnp.float32)
    place = jnp.clip(jnp.floor(confidence * bins).astype(jnp.int32), 0, bins - 1)
    gap = jax.ops.segment_sum(correct.astype(jnp.float32) - confidence, place, num_segments=bins)
    return jnp.sum(jnp.abs(gap)) / max(confidence.size, 1)


def _pair(policy_chosen_reward: Array, policy_rejected_reward: Array) -> tuple[Array, Array]:
    chex.assert_equal_shape([policy_chosen_reward, policy_rejected_reward])
    return policy_chosen_reward.astype(jnp.float32), policy_rejected_reward.astype(jnp.float32)


def _pair_metrics(chosen: Array, rejected: Array) -> dict[str, Array]:
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).astype(jnp.float32),
    }


def _items(mask: Array) -> Array:
    """Which items of a list are there, bool [B, K] of a mask [B, K, T]."""
    return (mask != 0).any(-1)
