"""Diffusion-NPO: a model trained against the preference is the negative branch of guidance.

Wang et al. 2025, "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion
Models", arXiv 2505.11245 (ICLR 2025). Evidence: official code; the combination of weights from published summaries.

    loss      = -log sigmoid(-z) = softplus(z),      z of Diffusion-DPO: images exchanged, nothing else
    theta_neg = theta + alpha (theta_pos - theta) + beta delta,      delta: what the exchanged loss changed
    guided    = e_neg(x, empty) + s (e_pos(x, prompt) - e_neg(x, empty))

Sampling is `sampler.guided(positive, scale, negative_predict=negative)` with the prompt and the empty prompt. The
published scripts have z without the 1/2 at beta 500 (Stable Diffusion 1.5) and with it at beta 2000 (SDXL): here the
first is beta 1000. Their `merge_weight` is 1 - alpha. Positive and negative must stay correlated in high dimensions,
hence alpha = 1; delta = 0 and alpha = 0 guide a tuned model by its base.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> out = diffusion_npo_loss(policy_chosen_error=error, policy_rejected_error=error,
...                reference_chosen_error=error + 0.001, reference_rejected_error=error, beta=2000.0)
>>> round(float(out.loss[0]), 4)
1.3133
"""

import jax

from dpo_jax.diffusion.ops import pair_gains, scaled_gain_metrics
from dpo_jax.ops import logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def diffusion_npo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 2000.0,
) -> LossOutput:
    """Diffusion-DPO with chosen and rejected exchanged.

    Args:
      policy_chosen_error, policy_rejected_error: [B] mean squared errors; the data's labels, not exchanged.
      reference_chosen_error, reference_rejected_error: [B] the same of the reference; constants.
      beta: strength of the tie to the reference.

    Returns:
      loss and metrics float32 [B]. The metrics are those of the data's labels: training drives accuracy to 0.

    Raises:
      ValueError: beta not positive.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    metrics = scaled_gain_metrics(gains, 0.5 * beta)
    return LossOutput(logistic_loss(-0.5 * beta * gains.margin), metrics)


def compose_negative(
    base: PyTree, *, negative: PyTree, positive: PyTree | None = None, alpha: float = 1.0, beta: float = 1.0
) -> PyTree:
    """Parameters of the negative branch, base + alpha (positive - base) + beta (negative - base).

    Args:
      base: parameters before any tuning.
      negative: what `diffusion_npo_loss` (or another method's exchanged loss) made of them.
      positive: parameters tuned to the preference, None for the base itself.
      alpha: share of the positive offset; 0 leaves it out.
      beta: share of the negative offset.
    """
    positive = base if positive is None else positive
    return jax.tree.map(
        lambda origin, good, bad: origin + alpha * (good - origin) + beta * (bad - origin), base, positive, negative
    )
