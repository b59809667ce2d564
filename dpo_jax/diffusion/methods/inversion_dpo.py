"""Inversion-DPO: policy and reference compared along the whole inverted trajectory of both images.

Li et al. 2025, "Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models", arXiv 2507.11554 (ACM MM).
Evidence: trajectory, weights, sign and loss from the official code; the paper's last equation could not be compared.

    z_0 = x_0;  e_ref,k = guided reference at (z_k, t_k);  z_{k+1} = DDIM inversion with e_ref,k
    D(x) = (1 / S) sum_k 1 / (2 abar_k) mean (e_theta,k - e_ref,k)^2
    loss = -log sigmoid(sign (beta / 2) (D(x_w) - D(x_l)))

D is the divergence of the policy's steps from the reference's, up to factors. On states of the reference the expected
log-ratio is -D, so the default sign is -1: the policy leaves the reference on the rejected image. The published code
has +1. For other parameterisations the same difference of noises is written in theirs: 1 / (2 det^2) of their error.

D is quadratic around the reference: at policy = reference the loss is log 2 and its gradient exactly zero, so training
does not start there. The published code starts because it rounds policy and reference differently. Here the policy gets
noise of START_NOISE of its parameters' deviation (`perturb.perturb`; the command line does it), or is another
checkpoint. Near the reference the gradient is linear in that distance.

>>> import jax.numpy as jnp
>>> out = inversion_dpo_loss(policy_chosen_error=jnp.array([0.001]), policy_rejected_error=jnp.array([0.002]))
>>> round(float(out.loss[0]), 4)
0.3133
"""

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.errors import Inputs, inversion_steps
from dpo_jax.diffusion.inversion import invert
from dpo_jax.diffusion.ops import gain_metrics
from dpo_jax.diffusion.process import Process, empty_condition, level_of
from dpo_jax.diffusion.sampler import Guidance, guided
from dpo_jax.diffusion.types import Predict
from dpo_jax.ops import logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput, PyTree

START_NOISE = 1e-3


def inversion_dpo_inputs(
    *,
    clean: Array,
    condition: PyTree,
    process: Process,
    reference: Predict,
    trajectory_steps: int = 40,
    guidance: float = 2.0,
) -> Inputs:
    """The reference's inverted trajectory of each image; its predictions are the targets.

    No timestep and no noise is drawn. States and predictions of all steps are kept: 2 S times the latents.

    Args:
      clean: [N, ...]; condition: leaves [N, ...].
      process: what the models were trained to undo.
      reference: the frozen model, which inverts.
      trajectory_steps: S of the trajectory; 80 in the published launcher, 40 in its code.
      guidance: inside both models; 1 leaves the empty prompt out. The published SDXL code's empty prompt is zeros.
    """
    table, rows = inversion_steps(process, trajectory_steps, offset=0), clean.shape[0]
    model, told = reference, condition
    if guidance != 1:
        model, told = guided(reference, guidance), Guidance(condition, empty_condition(process, condition))
    found = invert(model, clean, table, told, parameterisation=process.parameterisation, record=True)
    assert found.states is not None and found.predictions is not None
    states, targets = (jnp.moveaxis(x, 1, 0) for x in (found.states[:, :-1], found.predictions))  # [S, N, ...]
    times = jnp.asarray(table.time[::-1])  # rising, as the inversion runs
    weights = step_weights(process, times)
    spread = (jnp.broadcast_to(x[:, None], (trajectory_steps, rows)) for x in (times, weights))
    times, weights = spread
    return jax.lax.stop_gradient(Inputs(states, times, targets, condition, weights))._replace(guidance=guidance)


def step_weights(process: Process, times: Array) -> Array:
    """Weights of a trajectory's errors [S] -> float32 [S]: 1 / (2 S abar) for predicted noise.

    The same sum over other predictions p of one noise has d noise = alpha dp / (alpha a - sigma b), hence
    1 / (2 S det^2): 1 / (2 S) for velocities and straight paths.
    """
    alpha, sigma = level_of(process, times)
    a, b = process.parameterisation(alpha, sigma)
    return jnp.asarray(0.5 / jnp.square(alpha * a - sigma * b) / times.shape[0], jnp.float32)


def inversion_dpo_loss(
    *, policy_chosen_error: Array, policy_rejected_error: Array, beta: float = 2000.0, sign: float = -1.0
) -> LossOutput:
    """The loss of Inversion-DPO.

    Args:
      policy_chosen_error, policy_rejected_error: [B] weighted sums D along the trajectories of `inversion_dpo_inputs`.
      beta: strength of the tie to the reference; published with guidance 2, which squares into D.
      sign: -1, consistent with states of the reference, or 1, as published.

    Returns:
      loss and metrics float32 [B]; rewards are sign beta / 2 times D.

    Raises:
      ValueError: beta not positive, or another sign.
    """
    require_positive(beta=beta)
    if sign not in (-1, 1):
        raise ValueError(f"sign is {sign}; give -1 or 1")
    chosen, rejected = (0.5 * beta * sign * d.astype(jnp.float32) for d in (policy_chosen_error, policy_rejected_error))
    return LossOutput(logistic_loss(chosen - rejected), gain_metrics(chosen, rejected))
