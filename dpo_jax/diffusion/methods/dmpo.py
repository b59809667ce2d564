"""DMPO: the policy's preference between two images is fitted by the reverse KL divergence.

"Divergence Minimization Preference Optimization for Diffusion Model Alignment", 2025, arXiv 2507.07510. Evidence:
objective and hyper-parameters from a peer's code (that of arXiv 2511.03317), framing from the abstract; the authors'
code was not found. It is EXO on two answers (arXiv 2402.00856) with implicit rewards of diffusion models.

    u    = (beta / 2) [ (L_ref^w - L_theta^w) - (L_ref^l - L_theta^l) ],   p = sigma(u),   q = 1 - alpha
    loss = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),   slope p (1 - p) (u - log(q / (1 - q)))

Diffusion-DPO with smoothed labels is the forward divergence. Here the loss is bounded, has its only minimum, zero, at
u = log((1 - alpha) / alpha), and lets go of pairs that are far off on either side; its push at the start is 2.3 times
that of Diffusion-DPO.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> arrays = dict(policy_chosen_error=error, policy_rejected_error=error,
...               reference_chosen_error=error, reference_rejected_error=error)
>>> round(float(dmpo_loss(**arrays).loss[0]), 3)  # -log 2 - (log 0.99 + log 0.01) / 2
1.614
"""

import math

import jax

from dpo_jax.diffusion.ops import pair_gains, scaled_gain_metrics
from dpo_jax.ops import logistic_loss, require_between, require_positive
from dpo_jax.types import Array, LossOutput

_LEAST = 1e-6  # of either label's probability


def dmpo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 2000.0,
    alpha: float = 0.01,
) -> LossOutput:
    """Reverse KL divergence from the policy's preference to the labels'.

    Args:
      beta: as in Diffusion-DPO; 6000 for SDXL.
      alpha: probability that the label is wrong, in [0, 1]; taken into [1e-6, 1 - 1e-6].
    """
    require_positive(beta=beta)
    require_between(0.0, 1.0, alpha=alpha)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    u = 0.5 * beta * gains.margin
    right = min(max(1 - alpha, _LEAST), 1 - _LEAST)
    # sigma(-u), not 1 - sigma(u), which float32 rounds to 0 from u = 17 on.
    loss = -jax.nn.sigmoid(u) * (logistic_loss(u) + math.log(right))
    loss = loss - jax.nn.sigmoid(-u) * (logistic_loss(-u) + math.log1p(-right))
    return LossOutput(loss, scaled_gain_metrics(gains, 0.5 * beta))
