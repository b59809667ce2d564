"""One paper, one file: losses and other pure functions of the diffusion wing; they load jax and chex only."""

from dpo_jax.diffusion.methods.d3po import d3po_loss as d3po_loss
from dpo_jax.diffusion.methods.ddpo import ddpo_loss as ddpo_loss
from dpo_jax.diffusion.methods.ddpo import ddpo_sf_loss as ddpo_sf_loss
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss as diffusion_dpo_loss
from dpo_jax.diffusion.methods.flow_grpo import grpo_code_kl_loss as grpo_code_kl_loss
from dpo_jax.diffusion.methods.flow_grpo import grpo_kl_loss as grpo_kl_loss
from dpo_jax.diffusion.methods.flow_grpo import grpo_loss as grpo_loss
