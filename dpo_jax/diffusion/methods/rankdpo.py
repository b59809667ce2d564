"""RankDPO: Diffusion-DPO on all pairs of a list, each weighted by what swapping the two would do to the ranking's DCG.

Karthik et al. 2024, "Scalable Ranked Preference Optimization for Text-to-Image Generation", arXiv 2410.18013.
Evidence: algorithms and tables from the paper's text; mean errors, natural logarithm and beta are reconstructed.

    s_i     = L_theta,i - L_ref,i,   L = mean squared error of the prediction; low is good
    w_ij    = |2^phi_i - 2^phi_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|,   a constant
    loss    = sum over pairs with phi_i > phi_j of  -w_ij log sigma(-beta (s_i - s_j))

    rankdpo              ranks by phi, the labels (the paper's algorithm)
    rankdpo_model_ranks  ranks by -s, what the policy prefers now (its figure, and LambdaLoss)

phi_i is the share of comparisons that image i wins before an ensemble of reward models (`win_shares`). Beta is not
halved. Equal phi make no pair; the value is a sum over pairs, so learning rates do not carry over between list sizes.
A list of two with phi 1 and 0 is 1 / log 2 - 1 / log 3 = 0.5325 times the loss of the pair.

>>> import jax.numpy as jnp
>>> error, scores = jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])
>>> out = rankdpo_loss(policy_error=error, reference_error=error, scores=scores, valid=jnp.ones((1, 2)))
>>> round(float(out.loss[0] / jnp.log(2.0)), 4)
0.5325
>>> win_shares([[0.3, 0.9, 0.1], [5.0, 4.0, 1.0]]).tolist()
[0.75, 0.75, 0.0]
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.ops import error_gain
from dpo_jax.diffusion.process import Process
from dpo_jax.ops import lambda_weights, logistic_loss, ranks, require_positive, safe_divide, strict_pairs
from dpo_jax.types import Array, LossOutput, PyTree


def rankdpo_loss(
    *, policy_error: Array, reference_error: Array, scores: Array, valid: Array, beta: float = 5000.0
) -> LossOutput:
    """RankDPO with ranks by label; of equal labels the first in the list ranks higher.

    Args:
      scores: phi, [B, K].
      valid: [B, K], 0 at images that a list has not.
      beta: strength of the tie to the reference.
    """
    gain = _gains(policy_error, reference_error, valid)
    return _over_pairs(gain, scores, scores, valid, beta)


def rankdpo_model_ranks_loss(
    *, policy_error: Array, reference_error: Array, scores: Array, valid: Array, beta: float = 5000.0
) -> LossOutput:
    """RankDPO with ranks by what the policy prefers to the reference, through which no gradient flows.

    Args:
      scores: phi, [B, K].
      valid: [B, K], 0 at images that a list has not.
      beta: strength of the tie to the reference.
    """
    gain = _gains(policy_error, reference_error, valid)
    return _over_pairs(gain, scores, gain, valid, beta)


def rankdpo_inputs(*, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process) -> Inputs:
    """Each image has noise of its own; with `errors.noised_inputs` instead the images of a list share it."""
    return noised_inputs(clean=clean, noise=own_noise, times=times, condition=condition, process=process)


def rankdpo_model_ranks_inputs(
    *, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process
) -> Inputs:
    """The inputs of RankDPO."""
    return rankdpo_inputs(clean=clean, own_noise=own_noise, times=times, condition=condition, process=process)


def win_shares(scores: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
    """phi, float64 [..., K]: the share of comparisons with the list's other images that an image wins; host.

    A tie is won by nobody. Only the order that each reward model gives counts.

    Args:
      scores: [..., M, K] of M reward models for K images, at least two.

    Raises:
      ValueError: fewer than two images, or scores that are not finite.
    """
    table = np.asarray(scores, np.float64)
    if table.ndim < 2 or table.shape[-1] < 2 or not np.isfinite(table).all():
        raise ValueError(f"scores {list(table.shape)}; expected finite ones [..., reward models, at least two images]")
    wins = (table[..., :, None] > table[..., None, :]).sum(axis=-1)  # [..., M, K]
    return wins.mean(axis=-2) / (table.shape[-1] - 1)


def _gains(policy_error: Array, reference_error: Array, valid: Array) -> Array:
    """-s, float32 [B, K]; zero at absent images, so that nothing that stands there is read."""
    there = valid != 0
    return error_gain(jnp.where(there, policy_error, 0.0), jnp.where(there, reference_error, 0.0))


def _over_pairs(gain: Array, labels: Array, rank_by: Array, valid: Array, beta: float) -> LossOutput:
    require_positive(beta=beta)
    pairs = strict_pairs(labels, valid)  # [B, K, K]
    weights = jax.lax.stop_gradient(pairs * lambda_weights(labels, rank_by, valid))
    margins = jnp.where(pairs != 0, beta * (gain[:, :, None] - gain[:, None, :]), 0.0)
    count = jnp.sum(pairs, axis=(1, 2))
    right = jnp.sum(margins > 0, axis=(1, 2), dtype=jnp.float32)
    metrics = {
        "margin": safe_divide(jnp.sum(margins, axis=(1, 2)), count),
        "accuracy": safe_divide(right, count),
        "pairs": count,
        "ndcg": _ndcg(gain, labels, valid),
    }
    return LossOutput(jnp.sum(weights * logistic_loss(margins), axis=(1, 2)), jax.lax.stop_gradient(metrics))


def _ndcg(gain: Array, labels: Array, valid: Array) -> Array:
    """How good the policy's order is, float32 [B]: DCG by its ranks over the best one; 0 for lists worth nothing."""
    there = valid != 0
    worth = jnp.where(there, jnp.exp2(jnp.where(there, labels.astype(jnp.float32), 0.0)) - 1, 0.0)
    own, best = (jnp.sum(worth / jnp.log1p(ranks(by, valid)), axis=1) for by in (gain, labels))
    return safe_divide(own, best)
