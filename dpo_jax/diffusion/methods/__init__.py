"""One paper, one file: losses and other pure functions of the diffusion wing; they load jax and chex only."""

from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss as diffusion_dpo_loss
