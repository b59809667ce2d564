"""DDIM-InPO: Diffusion-DPO on noisy latents that the model itself would come through, found by DDIM inversion.

Lu et al. 2025, "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model
Alignment", arXiv 2503.18454 (CVPR 2025).
Evidence: inversion loop, fresh noise and loss from the official code, the derivation from published summaries.

    for s_k < t:  x <- DDIM inversion of one stride  +  eta sqrt(v_k) n                x = x_0 at first
    tau  = (x - sqrt(abar_t) x_0) / sqrt(1 - abar_t)                 the noise that the latents stand for
    loss = -log sigmoid(-(beta / 2) [ (|tau - e_theta|^2 - |tau - e_ref|^2)_w - (same)_l ])

The loss is Diffusion-DPO's, and `inpo_inputs` makes the inputs. The reference inverts; the published code asks the
live policy (`inpo_policy_inputs`). Inverted exactly by the reference, the reference's errors vanish and the loss is
Inversion-DPO's at one level.

>>> import jax.numpy as jnp
>>> errors = dict(policy_chosen_error=jnp.array([0.1]), policy_rejected_error=jnp.array([0.1]),
...               reference_chosen_error=jnp.array([0.101]), reference_rejected_error=jnp.array([0.1]))
>>> round(float(inpo_loss(**errors, beta=2000.0).loss[0]), 4)
0.3133
"""

from dpo_jax.diffusion.errors import Inputs, inverted_inputs
from dpo_jax.diffusion.ops import pair_gains, scaled_gain_metrics
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.types import Predict
from dpo_jax.ops import logistic_loss, require_between, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def inpo_inputs(
    *,
    clean: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    reference: Predict,
    key: Array,
    inversion_steps: int = 10,
    eta: float = 0.1,
    snap: bool = True,
) -> Inputs:
    """Images inverted by the reference up to their timestep.

    Args:
      clean: [N, ...]; times: [N], shared by the images of a row; condition: leaves [N, ...].
      process: what the models were trained to undo.
      reference: the frozen model, which inverts, without guidance.
      key: of the batch, or keys [N] of its images; of the fresh noise, which each image has of its own.
      inversion_steps: of the inversion's grid over all timesteps.
      eta: share of fresh noise after each step; 0 for none, which straight paths need.
      snap: tell the models the level that the inversion reached; False tells them the drawn timestep, as published.
    """
    require_between(0.0, 1.0, eta=eta)
    return inverted_inputs(
        reference,
        clean=clean,
        times=times,
        condition=condition,
        process=process,
        steps=inversion_steps,
        eta=eta,
        key=key,
        snap=snap,
    )


def inpo_policy_inputs(
    *,
    clean: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    policy: Predict,
    key: Array,
    inversion_steps: int = 10,
    eta: float = 0.1,
    snap: bool = False,
) -> Inputs:
    """Images inverted by the live policy, as in the published code; arguments as in `inpo_inputs`."""
    return inpo_inputs(
        clean=clean,
        times=times,
        condition=condition,
        process=process,
        reference=policy,
        key=key,
        inversion_steps=inversion_steps,
        eta=eta,
        snap=snap,
    )


def inpo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 2000.0,
) -> LossOutput:
    """The loss of DDIM-InPO, that of Diffusion-DPO.

    Args:
      policy_chosen_error, policy_rejected_error: [B] mean squared errors at inverted latents.
      reference_chosen_error, reference_rejected_error: [B] the same of the reference; constants.
      beta: strength of the tie to the reference; 2000 for Stable Diffusion 1.5, 5000 for SDXL.

    Returns:
      loss and metrics float32 [B]; rewards are beta / 2 times the gain over the reference.

    Raises:
      ValueError: beta not positive.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    metrics = scaled_gain_metrics(gains, 0.5 * beta)
    return LossOutput(logistic_loss(0.5 * beta * gains.margin), metrics)
