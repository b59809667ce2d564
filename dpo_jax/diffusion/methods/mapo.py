"""MaPO: fine-tuning on the chosen image plus a margin of bounded likelihood scores, without a reference.

Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
arXiv 2406.06424. Evidence: loss and defaults confirmed from the official code.

    phi(L) = s L / (exp(s L) - 1),   L = mean squared error of the policy's prediction, s a constant in place of the SNR
    loss   = L^w - beta log sigma(T (phi(L^w) - phi(L^l)))

phi falls from 1 at L = 0 to 0, as -s/2 L near 0: for small errors the second term is Diffusion-DPO without a reference
and a beta of T s = 500. Here beta is the weight of the preference: a larger one pushes more. beta = 0 is fine-tuning on
the chosen images.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> round(float(mapo_loss(policy_chosen_error=error, policy_rejected_error=error, beta=1.0).loss[0]), 4)  # + log 2
1.1931
"""

import jax
import jax.numpy as jnp

from dpo_jax.ops import logistic_loss, require_between, require_positive
from dpo_jax.types import Array, LossOutput


def mapo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    beta: float = 0.1,
    snr: float = 0.5,
    margin_scale: float = 1000.0,
) -> LossOutput:
    """The loss of MaPO; metrics are the two scores, their margin and its sign.

    Args:
      beta: weight of the preference term, at least 0.
      snr: s, how fast the score falls with the error.
      margin_scale: T, the number of timesteps in the official code.
    """
    require_between(0.0, float("inf"), beta=beta)
    require_positive(snr=snr, margin_scale=margin_scale)
    chosen_error = policy_chosen_error.astype(jnp.float32)
    chosen = likelihood_score(snr * chosen_error)
    rejected = likelihood_score(snr * policy_rejected_error.astype(jnp.float32))
    margin = margin_scale * (chosen - rejected)
    metrics = {
        "chosen_score": chosen,
        "rejected_score": rejected,
        "margin": margin,
        "accuracy": (margin > 0).astype(jnp.float32),
    }
    return LossOutput(chosen_error + beta * logistic_loss(margin), jax.lax.stop_gradient(metrics))


def likelihood_score(x: Array) -> Array:
    """x / (e^x - 1) for x >= 0, float32: 1 at 0, falling to 0."""
    x = x.astype(jnp.float32)
    small = x < 0.5
    # Near 0 the derivative of the quotient is a difference of nearly equal numbers; the series has the digits.
    near = jnp.where(small, x, 0.0)
    square = jnp.square(near)
    series = 1 - near / 2 + square / 12 * (1 - square / 60 * (1 - square / 42))
    far = jnp.where(small, 1.0, x)
    return jnp.where(small, series, far * jnp.exp(-far) / -jnp.expm1(-far))
