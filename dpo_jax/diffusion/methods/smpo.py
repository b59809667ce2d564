"""SmPO: labels as sure as a reward model is, and noisy latents from inversion with one ReNoise correction.

Lu et al. 2025, "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied Human
Preferences", arXiv 2506.02698 (ICML 2025).
Evidence: weights, inversion loop and loss from the official code, the mixture behind gamma from published summaries.

    p    = sigmoid(r_w - r_l),  r = (score - score_min) / (score_max - score_min)
    w    = gamma (2 p - 1) = gamma tanh((r_w - r_l) / 2)
    z    = (beta / 2) w [ (L_ref^w - L_theta^w) - (L_ref^l - L_theta^l) ],   errors at inverted latents
    loss = -log sigmoid(z)

Images of equal score give log 2 and no gradient. Weight 1 and plainly noised latents: Diffusion-DPO. The model that
inverts is the reference; `smpo_policy_inputs` has the published code's live policy, which leaves the data of the
two-mode world sooner where beta is small.
The scores' ends are PickScore's cosines on Pick-a-Pic v2; other scorers need their own.

>>> import jax.numpy as jnp
>>> top, low = jnp.array([0.28201571106910706]), jnp.array([0.11543526500463486])
>>> round(float(smoothed_weight(chosen_score=top, rejected_score=low)[0]), 4)
4.6212
"""

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.errors import Inputs, inverted_inputs
from dpo_jax.diffusion.inversion import averaged
from dpo_jax.diffusion.ops import pair_gains, scaled_gain_metrics
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.types import Predict
from dpo_jax.ops import logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput, PyTree

SCORE_MIN, SCORE_MAX = 0.11543526500463486, 0.28201571106910706  # PickScore, least and largest of Pick-a-Pic v2


def smoothed_weight(
    *,
    chosen_score: Array,
    rejected_score: Array,
    gamma: float = 10.0,
    score_min: float = SCORE_MIN,
    score_max: float = SCORE_MAX,
) -> Array:
    """gamma (2 p - 1) of pairs, float32 [B], a constant; p is the probability of the label by the scores.

    Args:
      chosen_score, rejected_score: [B] of one scorer; the weight is negative where the rejected image's is larger.
      gamma: sensitivity.
      score_min, score_max: of the scorer on the data.

    Raises:
      ValueError: gamma or the range of scores is not positive.
    """
    require_positive(gamma=gamma)
    require_positive(**{"score_max - score_min": score_max - score_min})
    gap = (chosen_score.astype(jnp.float32) - rejected_score.astype(jnp.float32)) / (score_max - score_min)
    return jax.lax.stop_gradient(gamma * jnp.tanh(0.5 * gap))


def smpo_inputs(
    *,
    clean: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    reference: Predict,
    inversion_steps: int = 10,
    calls: int = 2,
    snap: bool = True,
) -> Inputs:
    """Images inverted by the reference up to their timestep, with the mean of a step's predictions.

    Args:
      clean: [N, ...]; times: [N], shared by the images of a row; condition: leaves [N, ...].
      process: what the models were trained to undo.
      reference: the frozen model, which inverts, without guidance.
      inversion_steps: of the inversion's grid over all timesteps; 5 for Stable Diffusion 1.5.
      calls: predictions of a step that are averaged; 1 is plain DDIM inversion.
      snap: tell the models the level that the inversion reached; False tells them the drawn timestep, as published.
    """
    return inverted_inputs(
        reference,
        clean=clean,
        times=times,
        condition=condition,
        process=process,
        steps=inversion_steps,
        weights=averaged(0, calls),
        snap=snap,
    )


def smpo_policy_inputs(
    *,
    clean: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    policy: Predict,
    inversion_steps: int = 10,
    calls: int = 2,
    snap: bool = False,
) -> Inputs:
    """Images inverted by the live policy, as in the published code; arguments as in `smpo_inputs`."""
    return smpo_inputs(
        clean=clean,
        times=times,
        condition=condition,
        process=process,
        reference=policy,
        inversion_steps=inversion_steps,
        calls=calls,
        snap=snap,
    )


def smpo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    chosen_score: Array,
    rejected_score: Array,
    beta: float = 2000.0,
    gamma: float = 10.0,
    score_min: float = SCORE_MIN,
    score_max: float = SCORE_MAX,
) -> LossOutput:
    """The loss of SmPO.

    Args:
      policy_chosen_error, policy_rejected_error: [B] mean squared errors at inverted latents.
      reference_chosen_error, reference_rejected_error: [B] the same of the reference; constants.
      chosen_score, rejected_score: [B] of the reward model. The chosen image is the one with the higher score.
      beta: strength of the tie to the reference; 2000 for Stable Diffusion 1.5, 5000 for SDXL.
      gamma: sensitivity of the weight to the scores.
      score_min, score_max: of the scorer on the data.

    Returns:
      loss and metrics float32 [B]; rewards have the weight in them, so equal scores count as wrong.

    Raises:
      ValueError: beta, gamma or the range of scores is not positive.
    """
    require_positive(beta=beta)
    weight = smoothed_weight(
        chosen_score=chosen_score, rejected_score=rejected_score, gamma=gamma, score_min=score_min, score_max=score_max
    )
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    scale = 0.5 * beta * weight  # [B]
    metrics = scaled_gain_metrics(gains, scale)
    return LossOutput(logistic_loss(scale * gains.margin), {**metrics, "weight": weight})
