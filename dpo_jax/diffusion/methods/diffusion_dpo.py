"""Diffusion-DPO: preference optimisation of the evidence bound, one noised pair at a time.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", arXiv 2311.12908 (CVPR 2024).
Evidence: loss, data rules and schedules confirmed from the official code, beta and schedule from the paper's text.

    z    = (beta / 2) [ (L_ref^w - L_theta^w) - (L_ref^l - L_theta^l) ],   L = mean squared error of the prediction
    loss = -log sigmoid(z)

The images of a pair share the timestep and the noise. Errors are means over elements: with sums the same loss needs
beta / elements. At policy = reference the loss is log 2 and its gradient is not zero.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> out = diffusion_dpo_loss(
...     policy_chosen_error=error, policy_rejected_error=error,
...     reference_chosen_error=error + 0.001, reference_rejected_error=error, beta=2000.0)
>>> round(float(out.loss[0]), 4), round(float(out.metrics["margin"][0]), 4)
(0.3133, 1.0)
"""

from dpo_jax.diffusion.ops import pair_gains, scaled_gain_metrics
from dpo_jax.ops import require_between, require_positive, smoothed_logistic_loss
from dpo_jax.types import Array, LossOutput


def diffusion_dpo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 5000.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """The loss of Diffusion-DPO (arXiv 2311.12908, eq. 14 with T and the weight in beta).

    Args:
      policy_chosen_error, policy_rejected_error: [B] mean squared errors of the policy's predictions.
      reference_chosen_error, reference_rejected_error: [B] the same of the reference; constants.
      beta: strength of the tie to the reference; 2000 to 5000 for latents, about 20 in two dimensions.
      label_smoothing: share of wrong labels, in [0, 0.5).

    Returns:
      loss and metrics float32 [B]; rewards are beta / 2 times the gain over the reference.

    Raises:
      ValueError: beta not positive, or label_smoothing outside [0, 0.5).
    """
    require_positive(beta=beta)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    logits = 0.5 * beta * gains.margin
    metrics = scaled_gain_metrics(gains, 0.5 * beta)
    return LossOutput(smoothed_logistic_loss(logits, label_smoothing), metrics)
