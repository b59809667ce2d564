"""LD-DPO: DPO in which the longer answer's tokens beyond the shared length count less.

Liu et al. 2024, arXiv 2409.06411 (Length Desensitisation in DPO). Evidence: other libraries and public descriptions of
the construction that agree. With l = min(|y_w|, |y_l|) the shared length and k = 1, 2, ... the place of a token among
its completion's tokens,

    w_k = 1 if k <= l else alpha,   u = sum_k w_k (log pi(y_k) - log pi_ref(y_k)) over y_w,  v likewise over y_l
    loss = -log sigma(beta (u - v))

The tail of the longer answer is taken as alpha parts content and 1 - alpha parts verbosity. Weights stand on
log-probabilities of the policy AND of the reference, so that log 2 stays the value at the reference. Only the longer
answer of a pair is touched; prompts and padding do not matter, tokens are counted, not columns.
Shapes: log-probabilities and masks [B, T]; results [B] float32. Reference and masks are constants.
Reduces to: DPO at alpha = 1 and for equal lengths; DPO of both answers cut to the shared length at alpha = 0.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = ld_dpo_loss(**pair, beta=0.5, alpha=0.5)  # u = 1 + 0.5 * 1, v = -1, x = 1.25
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f}")
0.2519 1.25
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, logistic_loss, masked_count, pair_metrics, require_between, require_positive
from dpo_jax.types import Array, LossOutput


class PairWeights(NamedTuple):
    """Token weights of a pair, each float32 [B, T], zero behind the mask."""

    chosen: Array
    rejected: Array


def ld_weights(
    *, chosen_mask: Array, rejected_mask: Array, alpha: float = 0.5, last_token_full_weight: bool = False
) -> PairWeights:
    """One up to the shared length of each pair, alpha beyond it.

    Args:
      chosen_mask, rejected_mask: [B, T] and [B, T'], one at completion tokens; T and T' may differ.
      alpha: weight of the longer answer's tail, in [0, 1].
      last_token_full_weight: keep weight one on the last token of every completion. A longer answer's end-of-text
        token stands in its tail, that of the shorter answer does not: with answers of a few tokens the paper's weights
        push the probability of stopping down, which makes answers longer. At hundreds of tokens it hardly matters.
    """
    require_between(0.0, 1.0, alpha=alpha)
    chosen_length, rejected_length = _token_count(chosen_mask), _token_count(rejected_mask)
    shared = jnp.minimum(chosen_length, rejected_length)

    def weigh(mask: Array, length: Array) -> Array:
        there = mask != 0
        place = jnp.cumsum(there.astype(jnp.float32), axis=-1)
        full = place <= shared[:, None]
        if last_token_full_weight:
            full |= place == length[:, None]
        return jnp.where(there, jnp.where(full, 1.0, alpha), 0.0)

    return PairWeights(weigh(chosen_mask, chosen_length), weigh(rejected_mask, rejected_length))


def ld_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    alpha: float = 0.5,
    last_token_full_weight: bool = False,
) -> LossOutput:
    """Length-desensitised DPO; rewards and log ratios in the metrics are the weighted ones, `shared_length` is l.

    The best alpha depends on the model (0.3 to 0.6 are reported): sweep it.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      alpha: weight of the longer answer's tail, in [0, 1]; 1 is DPO.
      last_token_full_weight: keep weight one on the last token of every completion, for short answers (`ld_weights`).
    """
    require_positive(beta=beta)
    chex.assert_equal_shape_prefix([chosen_mask, rejected_mask], 1)
    weights = ld_weights(
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
        alpha=alpha,
        last_token_full_weight=last_token_full_weight,
    )
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask, weights.chosen)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask, weights.rejected)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    shared_length = jnp.minimum(_token_count(chosen_mask), _token_count(rejected_mask))
    loss = logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    return LossOutput(loss, {**metrics, "shared_length": shared_length})


def _token_count(mask: Array) -> Array:
    """Number of tokens of each completion, [B, T] -> float32 [B], whatever they weigh."""
    return masked_count(mask != 0)
