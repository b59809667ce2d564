"""Preference-optimisation methods for language, one paper per module; importing a loss loads only jax and chex."""

from dpo_jax.language.methods.dpo import (
    alpha_divergence_loss,
    cdpo_loss,
    dpo_loss,
    forward_kl_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    js_loss,
    rdpo_loss,
    reference_free_loss,
    robust_loss,
    rpo_loss,
    rpo_sum_loss,
    rpo_token_mean_loss,
)
from dpo_jax.language.methods.sft import sft_loss
from dpo_jax.language.methods.wpo_weights import wpo_loss

__all__ = [
    "alpha_divergence_loss",
    "cdpo_loss",
    "dpo_loss",
    "forward_kl_loss",
    "hinge_loss",
    "ipo_loss",
    "ipo_sum_loss",
    "js_loss",
    "rdpo_loss",
    "reference_free_loss",
    "robust_loss",
    "rpo_loss",
    "rpo_sum_loss",
    "rpo_token_mean_loss",
    "sft_loss",
    "wpo_loss",
]
