"""Robust alignment under distribution shift: the worst mixture near the data, of losses that golden-looking pairs lead.

Zhu et al. 2025, arXiv 2504.05831 (named DoRA by its authors; not the adapters of that name). Evidence: published
summaries of the paper (objective, calibration, classifiers); where the stabiliser stands, and that a pair's calibration
is the mean of its two answers', is rebuilt. With l_i a loss of example i (here DPO's) and h_i >= 0 its calibration,

    loss = lambda log( 1/B sum_i exp(h_i l_i / lambda) )  =  max_Q  E_Q[h l] - lambda KL(Q || data)
    h(y) = 1/n sum_i gamma_i c_i / (m_i (1 - c_i) + eps)

c_i: probability that y is golden (human) and not of source i, by a classifier; gamma_i: n_source_i / n_golden; m_i:
share of the source in the data. The best Q has weights softmax(h l / lambda). Dr.DPO (arXiv 2407.07880) has the other
sign.

Shapes: log-probabilities and masks [B, T], calibration [B] a column; every result [B] float32. Reference, column and
masks are constants. Options out of their range raise ValueError.
Reduces to: mean h l as lambda -> inf, max h l as lambda -> 0; plain KL-DRO at h = 1; l itself if all of them are equal.
Metrics: those of pairs, `calibrated_loss` h l, and `worst_case_weight`, the example's weight in Q times the batch size.

>>> import jax.numpy as jnp
>>> pairs = dict(policy_chosen_logps=jnp.zeros((2, 1)), reference_chosen_logps=jnp.zeros((2, 1)),
...              policy_rejected_logps=jnp.zeros((2, 1)), reference_rejected_logps=jnp.zeros((2, 1)),
...              chosen_mask=jnp.ones((2, 1)), rejected_mask=jnp.ones((2, 1)))
>>> output = robust_shift_loss(**pairs, calibration=jnp.array([2.0, 0.0]))  # log((e^{2 log 2} + 1) / 2) = log 2.5
>>> [f"{x:.4f}" for x in output.loss]
['0.9163', '0.9163']
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, logistic_loss, pair_metrics, present, require_positive
from dpo_jax.types import Array, LossOutput


def robust_shift_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    calibration: Array,
    beta: float = 0.1,
    penalty_coef: float = 1.0,
) -> LossOutput:
    """DPO under the worst mixture near the data, calibrated towards golden pairs.

    This loss is batch-coupled: one number, lambda log mean exp(h l / lambda) over the rows that are there, given to
    every row. Under microbatches it is the mean of the microbatches' numbers, which is smaller.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      penalty_coef: the paper's lambda, price of a nat between the worst mixture and the data, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    base = logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    there = present(chosen_mask, rejected_mask)
    values = jax.lax.stop_gradient(calibration.astype(jnp.float32)) * base
    worst = kl_dro(values, there, penalty_coef=penalty_coef)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    metrics |= {"calibrated_loss": values, "worst_case_weight": worst.weights * jnp.sum(there)}
    return LossOutput(jnp.broadcast_to(worst.value, base.shape), metrics)


class WorstCase(NamedTuple):
    """The worst mixture of examples within reach.

    Attributes:
      value: float32 scalar, lambda log mean exp(values / lambda) over the examples that are there; 0 if none is.
      weights: float32 [B] of the mixture, a constant; they sum to 1 and are 0 at empty places.
    """

    value: Array
    weights: Array


def kl_dro(values: Array, there: Array, *, penalty_coef: float = 1.0) -> WorstCase:
    """Worst-case mean of losses over mixtures whose KL divergence from the data has a price: any loss, any batch.

    Between mean and maximum of the values, falling with the price. Its gradient is the values' mean in the mixture.

    Args:
      values: [B] (calibrated) losses; not read where nothing is there.
      there: [B], zero at empty places of a batch.
      penalty_coef: lambda, price of a nat, above 0.
    """
    require_positive(penalty_coef=penalty_coef)
    chex.assert_equal_shape([values, there])
    there = there != 0
    count = jnp.sum(there, dtype=jnp.float32)
    # A finite stand-in for log 0: of -inf everywhere neither logsumexp nor softmax has a gradient.
    scaled = jnp.where(there, values.astype(jnp.float32) / penalty_coef, jnp.finfo(jnp.float32).min)
    mean = jax.nn.logsumexp(scaled) - jnp.log(jnp.maximum(count, 1.0))
    weights = jnp.where(there, jax.lax.stop_gradient(jax.nn.softmax(scaled)), 0.0)
    return WorstCase(jnp.where(count > 0, penalty_coef * mean, 0.0), weights)


def kl_dro_dual(values: Array, weights: Array, *, penalty_coef: float = 1.0) -> Array:
    """E_Q[values] - lambda KL(Q || uniform), float32 scalar: at most `kl_dro`'s value, which it meets at its weights.

    Args:
      values: [B] (calibrated) losses.
      weights: [B] of the mixture Q, not negative, with sum 1.
      penalty_coef: lambda, price of a nat, above 0.
    """
    require_positive(penalty_coef=penalty_coef)
    chex.assert_equal_shape([values, weights])
    weights = weights.astype(jnp.float32)
    log_density = jnp.log(jnp.where(weights > 0, weights, 1.0) * weights.size)
    return jnp.sum(weights * (values.astype(jnp.float32) - penalty_coef * log_density))


def golden_calibration(
    classifier_logits: Array, *, imbalance: Array, mixture: Array, stabilizer: float | None = None
) -> Array:
    """How golden an answer looks, float32 [...], at least 0 and at most mean(imbalance) / stabilizer.

    1/n sum_i gamma_i c_i / (m_i (1 - c_i) + eps) with c = sigma(logit). The column `calibration` of a pair is the mean
    of its two answers' values; divided by its mean over the data, it leaves the size of the loss as it was.

    Args:
      classifier_logits: [..., n] log odds of golden against source i, of n classifiers.
      imbalance: [n] gamma_i = examples of source i / golden examples in the classifier's training data.
      mixture: [n] m_i, share of source i in the preference data.
      stabilizer: eps, above 0, which keeps sure classifiers from making single examples rule; 1/n by default.
    """
    n = classifier_logits.shape[-1]
    chex.assert_shape([imbalance, mixture], (n,))
    eps = 1.0 / n if stabilizer is None else stabilizer
    require_positive(stabilizer=eps)
    logits = classifier_logits.astype(jnp.float32)
    # c and 1 - c both from the logit: 1 - c of a sure classifier has no digits left.
    ratio = jax.nn.sigmoid(logits) / (mixture * jax.nn.sigmoid(-logits) + eps)
    return jnp.mean(imbalance * ratio, axis=-1)
