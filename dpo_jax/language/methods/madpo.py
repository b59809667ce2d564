"""MADPO: each pair's DPO loss times a weight made of its reward margin; hard pairs count more, easy ones less.

Rho 2025, arXiv 2510.05342 (Margin-Adaptive DPO). Evidence: official code. With h = r(y_w) - r(y_l) the margin of a
frozen Bradley-Terry reward model (a constant; on the logit scale, not standardised) and m = |h|,

    c(m) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) exp(steepness (m - tau)))
    w(h) = sigma(c h) / sigma(h)  if h > -tau,   1 otherwise
    loss = -w(h) log sigma(beta ((S_w - S_w^ref) - (S_l - S_l^ref)))

c falls from about c_max at 0 through 1 at tau to c_min. Where labels are Bradley-Terry with margin h the optimum of
beta times the log-ratio margin is h + log w(h) - log w(-h): c(|h|) h below tau, less than h beyond. With the default
tau nearly all pairs have c close to c_max, so DPO with beta / c_max is a baseline that must not be forgotten.
Shapes: log-probabilities and masks [B, T], scores and results [B] float32. Reference, masks and scores are constants.
Reduces to: DPO at c_max = 1 or c_min = 1, and for pairs with h = 0, h = tau or h <= -tau; w log 2 at the reference.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = madpo_loss(**pair, chosen_score=jnp.array([1.5]), rejected_score=jnp.array([0.5]), beta=0.5)
>>> print(f"{output.metrics['pair_weight'][0]:.3f} {output.loss[0]:.3f}")  # about sigma(2) / sigma(1), x = 1.5
1.204 0.242
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, logistic_loss, pair_metrics, require_between, require_positive
from dpo_jax.types import Array, LossOutput


class MarginWeights(NamedTuple):
    """Weight and amplification of each pair, float32 of the margin's shape.

    Attributes:
      weight: w(h), above 0 and at most 2 for margins above 0.
      coef: c(|h|), in [c_min, c_max].
    """

    weight: Array
    coef: Array


def madpo_weights(
    margin: Array, *, c_max: float = 2.0, c_min: float = 0.5, steepness: float = 1.0, tau: float = 6.906755
) -> MarginWeights:
    """Weights of pairs from the reward margins h; constants, no gradient reaches the margin.

    Args:
      margin: [...] reward of the chosen answer less that of the rejected one, in logits, any float dtype.
      c_max: amplification of margins near 0, at least 1.
      c_min: amplification of very large margins, in (0, 1].
      steepness: the paper's lambda, how fast c falls around tau, per logit; above 0.
      tau: margin at which a pair counts as in DPO, in logits, above 0; the default is log(0.999 / 0.001).
    """
    require_between(1.0, float("inf"), c_max=c_max)
    require_positive(c_min=c_min, steepness=steepness, tau=tau)
    require_between(0.0, 1.0, c_min=c_min)
    h = jax.lax.stop_gradient(margin.astype(jnp.float32))
    if c_max == 1 or c_min == 1:  # the limit of c, where the formula reads 0/0 or 1/0
        return MarginWeights(jnp.ones_like(h), jnp.ones_like(h))
    offset = math.log((c_max - 1) / (1 - c_min))
    coef = c_min + (c_max - c_min) * jax.nn.sigmoid(-(steepness * (jnp.abs(h) - tau) + offset))
    # w(0) = 1, the value wanted below -tau, where the ratio itself would grow like exp((1 - c) |h|).
    h = jnp.where(h > -tau, h, 0.0)
    return MarginWeights(jnp.exp(jax.nn.log_sigmoid(coef * h) - jax.nn.log_sigmoid(h)), coef)


def madpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    chosen_score: Array,
    rejected_score: Array,
    beta: float = 0.1,
    c_max: float = 2.0,
    c_min: float = 0.5,
    steepness: float = 1.0,
    tau: float = 6.906755,
) -> LossOutput:
    """Margin-adaptive DPO; the sum of the weights is not normalised. Metrics add `pair_weight`, `coef`, `score_margin`.

    The columns `chosen_score` and `rejected_score` [B] are the answers' rewards under the frozen reward model.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      c_max: amplification of margins near 0, at least 1.
      c_min: amplification of very large margins, in (0, 1].
      steepness: the paper's lambda, how fast the amplification falls around tau, per logit; above 0.
      tau: margin at which a pair counts as in DPO, in logits, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chex.assert_equal_shape([chosen.logps, chosen_score, rejected_score])
    score_margin = jax.lax.stop_gradient(chosen_score.astype(jnp.float32) - rejected_score.astype(jnp.float32))
    weight, coef = madpo_weights(score_margin, c_max=c_max, c_min=c_min, steepness=steepness, tau=tau)
    loss = weight * logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    return LossOutput(loss, {**metrics, "pair_weight": weight, "coef": coef, "score_margin": score_margin})


def gumbel_preference(scores_1: Array, scores_2: Array, key: Array, *, scale: float = 1.0) -> Array:
    """Label pairs by noisy scores: whether the first wins, bool [...], true with probability sigma((s1 - s2) / scale).

    Both scores get independent Gumbel noise of the given scale, whose difference is logistic.

    Args:
      scores_1, scores_2: [...] true scores of the two answers, any float dtype.
      key: PRNG key.
      scale: of the noise, in units of the scores, above 0.
    """
    require_positive(scale=scale)
    chex.assert_equal_shape([scores_1, scores_2])
    noise = scale * jax.random.gumbel(key, (2, *scores_1.shape), jnp.float32)
    return scores_1.astype(jnp.float32) + noise[0] >= scores_2.astype(jnp.float32) + noise[1]
