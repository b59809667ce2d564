"""TGDPO: DPO in which a trained preference model tells how strongly each token counts.

Zhu et al. 2025, arXiv 2506.14574. Evidence: official code (loss, weights, defaults), paper (derivation, ablations).
With S the sum over completion tokens and r_t = beta_g (log pi_guide(y_t) - log pi_ref(y_t)) the guidance, a constant,

    f_w(r) = 1 + alpha r,   f_l(r) = 1 - alpha r
    x = beta S(f_w(r_t) (log pi - log pi_ref)(y_w,t)) - beta S(f_l(r_t) (log pi - log pi_ref)(y_l,t))
    loss = softplus(-x)

The guide is any model with the same tokens, usually an earlier DPO or SimPO run; training restarts from the model that
run started from, and the guide's log-probabilities are columns of the data. beta_g is beta unless given.
A weight turns negative beyond |r_t| = 1 / alpha and then pushes its token the wrong way; `weight_floor` prevents that.
Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reduces to: DPO at alpha = 0, and with the reference as guide.
Metrics: those of DPO (`ops.pair_metrics`, rewards not weighted), `weighted_margin` x, and for each side the mean and
the least weight, and the share of tokens with a negative one.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             guidance_chosen_logps=jnp.array([[-1.0, -3.0]]), guidance_rejected_logps=jnp.array([[-5.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = tgdpo_loss(**pair, beta=0.5, alpha=1.0)  # r = (0.5, 0) and -1: x = 0.5 (1.5 + 1) + 0.5 * 2
>>> print(f"{output.loss[0]:.4f} {output.metrics['weighted_margin'][0]:.2f} {output.metrics['margin'][0]:.2f}")
0.1002 2.25 1.50
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    completion_sums,
    logistic_loss,
    masked_mean,
    pair_metrics,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


class TokenWeights(NamedTuple):
    """Strength of each token, constants.

    Attributes:
      chosen: float32 [B, T].
      rejected: float32 [B, T].
    """

    chosen: Array
    rejected: Array


def tgdpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    guidance_chosen_logps: Array,
    guidance_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    alpha: float = 0.5,
    guidance_beta: float | None = None,
    weight_floor: float | None = None,
) -> LossOutput:
    """DPO on log ratios weighted token by token by the guide's implicit rewards.

    Args:
      guidance_chosen_logps: [B, T] log-probabilities of the chosen answer under the guide, constants.
      guidance_rejected_logps: [B, T] the same of the rejected answer.
      beta: strength of the KL constraint to the reference, above 0.
      alpha: influence of the guidance on the weights, at least 0; 0 is DPO.
      guidance_beta: scale of the guidance, above 0: the beta that the guide was trained with; None for beta.
      weight_floor: least weight of a token; None for no floor, as the official code.
    """
    require_positive(beta=beta)
    scale = beta if guidance_beta is None else guidance_beta
    weights = tgdpo_weights(
        chosen_guidance=token_guidance(
            guidance_logps=guidance_chosen_logps,
            reference_logps=reference_chosen_logps,
            mask=chosen_mask,
            guidance_beta=scale,
        ),
        rejected_guidance=token_guidance(
            guidance_logps=guidance_rejected_logps,
            reference_logps=reference_rejected_logps,
            mask=rejected_mask,
            guidance_beta=scale,
        ),
        alpha=alpha,
        weight_floor=weight_floor,
    )
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    weighted_chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask, weights.chosen)
    weighted_rejected = completion_sums(
        policy_rejected_logps, reference_rejected_logps, rejected_mask, weights.rejected
    )
    x = beta * (weighted_chosen.log_ratio - weighted_rejected.log_ratio)
    metrics = {
        **pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio),
        "weighted_margin": x,
        **_weight_metrics("chosen", weights.chosen, chosen_mask),
        **_weight_metrics("rejected", weights.rejected, rejected_mask),
    }
    return LossOutput(logistic_loss(x), metrics)


def token_guidance(*, guidance_logps: Array, reference_logps: Array, mask: Array, guidance_beta: float) -> Array:
    """r_t, the guide's implicit reward of each token, float32 [..., T]; 0 behind the mask; constants.

    Args:
      guidance_logps: [..., T] log-probability of each completion token under the guide.
      reference_logps: [..., T] the same under the reference.
      mask: [..., T], one at completion tokens.
      guidance_beta: scale of the reward, above 0. A SimPO guide is read in the same way, without its length.
    """
    require_positive(guidance_beta=guidance_beta)
    chex.assert_equal_shape([guidance_logps, reference_logps, mask])
    ratios = guidance_logps.astype(jnp.float32) - reference_logps.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.where(mask != 0, guidance_beta * ratios, 0.0))


def tgdpo_weights(
    *, chosen_guidance: Array, rejected_guidance: Array, alpha: float = 0.5, weight_floor: float | None = None
) -> TokenWeights:
    """f_w and f_l of the guidance [B, T]: rewarded tokens count more when chosen, punished ones more when rejected.

    Args:
      chosen_guidance: [B, T] r_t of the chosen answer.
      rejected_guidance: [B, T] r_t of the rejected answer.
      alpha: influence of the guidance, at least 0.
      weight_floor: least weight, any finite number; None for none.
    """
    require_between(0.0, math.inf, alpha=alpha)
    weights = TokenWeights(1 + alpha * chosen_guidance, 1 - alpha * rejected_guidance)
    if weight_floor is None:
        return weights
    require_between(-math.inf, math.inf, weight_floor=weight_floor)
    return TokenWeights(jnp.maximum(weights.chosen, weight_floor), jnp.maximum(weights.rejected, weight_floor))


def _weight_metrics(side: str, weights: Array, mask: Array) -> dict[str, Array]:
    """Mean, least and share of negative weights among a completion's tokens, each [B]; 0 for an empty completion."""
    there = mask != 0
    least = jnp.min(jnp.where(there, weights, jnp.inf), axis=-1)
    return {
        f"{side}_weight": masked_mean(weights, mask),
        f"{side}_weight_min": jnp.where(there.any(-1), least, 0.0),
        f"{side}_weight_negative": masked_mean((weights < 0).astype(jnp.float32), mask),
    }
