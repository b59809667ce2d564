"""Adversarial preference optimisation: reward model and language model as opponents in a min-max game.

Cheng et al. 2023, arXiv 2311.08045. Evidence: official code (losses of the reward model, hyper-parameters, best-of
selection); the form of the game is rebuilt from the abstract. Not Anchored PO, not Accelerated PO.
Rows are lists: human answers with their scores, or (is_adversarial) an expert's gold answer, scored above samples of
the current language model. With n_i the pairs of row i whose scores differ and N = sum_i n_i over the whole batch,

    adversarial_reward      sum over pairs of c softplus(-(r_i - r_j)) / N,
                            c = preference_coef in human rows, adversarial_coef / samples in adversarial ones
    adversarial_difference  the same with -(r_i - r_j) in adversarial rows: the literal game, not bounded below
    adversarial_term_mean   each kind of rows divided by its own number of pairs instead of N
    rrhf                    rank_coef sum_{score_i > score_j} max(0, p_j - p_i) - log pi(y_best) / |y_best|,
                            p_i = log pi(y_i) / |y_i|^length_power           (Yuan et al. 2023, arXiv 2304.05302)
    raft                    `select_best`, then `sft_loss`                   (Dong et al. 2023, arXiv 2304.06767)

A round: sample from the language model, train the reward model on human and gold-against-sample rows, score fresh
samples, align the language model to them (RAFT, RRHF or DPO on best and worst). Rewards are constants in the second
half, samples in both. Gold answers equal to the policy's make adversarial rows label noise: let their weight fall with
the metric `margin` of these rows.

Shapes: policy_reward and scores [B, K], masks [B, K, T] that say which items are there, is_adversarial [B] int; policy
log-probabilities [B, K, T]. Every result [B] float32. Options out of their range raise ValueError.
Reduces to: `reward_pairs_loss` without adversarial rows; rrhf at rank_coef = 0 to SFT per token on the best answer.

>>> import jax.numpy as jnp
>>> lists = dict(policy_reward=jnp.array([[2.0, 0.5], [0.0, 0.0]]), mask=jnp.ones((2, 2, 1)),
...              scores=jnp.array([[1.0, 0.0], [1.0, 0.0]]), is_adversarial=jnp.array([0, 1]))
>>> [f"{x:.4f}" for x in adversarial_reward_loss(**lists, adversarial_coef=1.0, samples=2).loss]  # 0.2014, log(2)/2
['0.2014', '0.3466']
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    OrderedPairs,
    batch_mean,
    completion_sums,
    ordered_pairs,
    present,
    ranks,
    require_between,
    safe_divide,
    strict_pairs,
)
from dpo_jax.types import Array, LossOutput


def adversarial_reward_loss(
    *,
    policy_reward: Array,
    mask: Array,
    scores: Array,
    is_adversarial: Array,
    preference_coef: float = 1.0,
    adversarial_coef: float = 0.1,
    samples: int = 4,
) -> LossOutput:
    """The reward model's side of the game with ranking losses, as the authors run it.

    This loss is batch-coupled: both kinds of rows are divided by the number of pairs of the whole batch, so the mix of
    rows changes their weights (`adversarial_term_mean_loss` keeps them), and microbatches change the scale.

    Args:
      preference_coef: weight of human rows (the paper's beta_2), at least 0.
      adversarial_coef: weight of gold-against-sample rows, at least 0.
      samples: answers sampled per prompt, by which the weight of adversarial rows is divided; at least 1.
    """
    pairs = _pairs(policy_reward, mask, scores)
    weight = _weight(is_adversarial, preference_coef, adversarial_coef, samples)
    scale = batch_mean(pairs.count, present(mask))
    return LossOutput(weight * safe_divide(pairs.nll, scale), pairs.metrics)


def adversarial_difference_loss(
    *,
    policy_reward: Array,
    mask: Array,
    scores: Array,
    is_adversarial: Array,
    preference_coef: float = 1.0,
    adversarial_coef: float = 0.1,
    samples: int = 4,
) -> LossOutput:
    """The literal game: adversarial rows count -(r_gold - r_sample), linear and not bounded below.

    This loss is batch-coupled as `adversarial_reward_loss` is. Only the human rows hold the rewards back.

    Args:
      preference_coef: weight of human rows, whose loss stays the ranking one; at least 0.
      adversarial_coef: weight of gold-against-sample rows, at least 0.
      samples: answers sampled per prompt, by which the weight of adversarial rows is divided; at least 1.
    """
    pairs = _pairs(policy_reward, mask, scores)
    weight = _weight(is_adversarial, preference_coef, adversarial_coef, samples)
    scale = batch_mean(pairs.count, present(mask))
    loss = jnp.where(is_adversarial != 0, -pairs.gap, pairs.nll)
    return LossOutput(weight * safe_divide(loss, scale), pairs.metrics)


def adversarial_term_mean_loss(
    *,
    policy_reward: Array,
    mask: Array,
    scores: Array,
    is_adversarial: Array,
    preference_coef: float = 1.0,
    adversarial_coef: float = 0.1,
) -> LossOutput:
    """Ranking losses, each kind of rows averaged over its own pairs: weights do not depend on the mix of rows.

    This loss is batch-coupled: its mean over the batch is the weighted sum of the two means.

    Args:
      preference_coef: weight of the mean over pairs of human rows, at least 0.
      adversarial_coef: weight of the mean over pairs of gold-against-sample rows, at least 0.
    """
    pairs = _pairs(policy_reward, mask, scores)
    weight = _weight(is_adversarial, preference_coef, adversarial_coef, samples=1)
    there, adversarial = present(mask), is_adversarial != 0
    of_adversarial = batch_mean(pairs.count * adversarial, there)
    of_human = batch_mean(pairs.count * ~adversarial, there)
    scale = jnp.where(adversarial, of_adversarial, of_human)
    return LossOutput(weight * safe_divide(pairs.nll, scale), pairs.metrics)


def rrhf_loss(
    *, policy_logps: Array, mask: Array, scores: Array, rank_coef: float = 1.0, length_power: float = 1.0
) -> LossOutput:
    """RRHF: a hinge on every pair that the policy ranks against its scores, plus SFT on the best answer.

    Best is the largest score among the answers that are there, the first of equals. Metrics: the two terms, and the
    share of pairs that the policy ranks right.

    Args:
      rank_coef: weight of the hinges against the best answer's NLL per token, at least 0 (RRHF's code: 100).
      length_power: exponent of the length by which log-probabilities are divided in the hinges, at least 0.
    """
    require_between(0.0, math.inf, rank_coef=rank_coef, length_power=length_power)
    chex.assert_equal_shape([policy_logps, mask])
    answers = completion_sums(policy_logps, None, mask)  # fields [B, K]
    there = answers.length > 0
    pairs = strict_pairs(scores, there)  # [B, K, K]
    mean = safe_divide(answers.logps, jnp.where(there, answers.length, 1.0) ** length_power)
    gap = jnp.where(pairs != 0, mean[:, :, None] - mean[:, None, :], 0.0)
    rank = jnp.sum(jax.nn.relu(-gap), axis=(1, 2))
    best = (ranks(scores, there) == 1).astype(jnp.float32)
    nll = -jnp.sum(best * answers.mean_logps, axis=-1)
    right = safe_divide(jnp.sum(gap > 0, axis=(1, 2), dtype=jnp.float32), jnp.sum(pairs, axis=(1, 2)))
    return LossOutput(rank_coef * rank + nll, {"rank": rank, "nll": nll, "accuracy": right})


class Best(NamedTuple):
    """The best answer of each list.

    Attributes:
      index: int32 [...], 0 where no answer is there.
      keep: float32 [...], zero where no answer is there: such a prompt is left out.
    """

    index: Array
    keep: Array


def select_best(scores: Array, there: Array) -> Best:
    """RAFT's choice (arXiv 2304.06767): the answer with the largest score, the first of equals.

    Args:
      scores: [..., K] rewards.
      there: [..., K], zero at absent or empty answers, whose scores are not read.
    """
    chex.assert_equal_shape([scores, there])
    index = jnp.argmin(ranks(scores, there), axis=-1).astype(jnp.int32)
    return Best(index, (there != 0).any(-1).astype(jnp.float32))


def _pairs(policy_reward: Array, mask: Array, scores: Array) -> OrderedPairs:
    return ordered_pairs(policy_reward, scores, (mask != 0).any(-1))


def _weight(is_adversarial: Array, preference_coef: float, adversarial_coef: float, samples: int) -> Array:
    require_between(0.0, math.inf, preference_coef=preference_coef, adversarial_coef=adversarial_coef)
    if samples < 1:
        raise ValueError(f"samples is {samples}; give the number of sampled answers per prompt, at least 1")
    return jnp.where(is_adversarial != 0, adversarial_coef / samples, preference_coef)
