"""Baselines next to Diffusion-DPO: fine-tuning, other links of the same margin, DSPO, and the SDPO safeguard.

Supervised fine-tuning and captions that tell good from bad (CSFT, arXiv 2302.12192 for language) are standard
compositions, as are the smoothed loss (cDPO) and Diffusion-DPO with a fine-tuning term. Hinge (arXiv 2305.10425) and
IPO (arXiv 2310.12036) on denoising errors: from another library's code. DSPO (Zhu et al., ICLR 2025) and the safeguard
(Diffusion-SDPO, arXiv 2511.03317): from the latter's code. Evidence: code, and formulas; nothing measured again.

    m = (L_ref^w - L_ref^l) - (L_theta^w - L_theta^l),   z = (beta / 2) m,   L = mean squared error of the prediction

    sft            L_theta of single images               sft_chosen  L_theta^w (all these with diffusion_ before them)
    sft_both       (L_theta^w + L_theta^l) / 2            hinge       max(0, 1 - z)
    ipo            (m - 1 / (2 beta))^2, on m without the beta / 2
    conservative   (1 - e) softplus(-z) + e softplus(z), least at z = log((1 - e) / e)
    dpo_sft        softplus(-z) + c L_theta^w
    dspo           mean ((e_theta^w - target) - b sigma(-(b/2) m) (e_theta^w - e_ref^w))^2, differentiated through sigma
    dspo_threshold (1 - sigma(z))^2 times mean (e_theta^w - e_ref^w)^2 where that is at least 0.1, else times 1
    sdpo           -log sigma(z) whose gradient through L_theta^l is scaled by lambda (`rejected_scale`)

Hinge is 1 and IPO 1 / (4 beta^2) where the policy is the reference; DSPO is there the chosen image's error. With
c = 0, e = 0 or lambda = 1 the three losses that have them are Diffusion-DPO; with equal tags CSFT is sft_both.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> arrays = dict(policy_chosen_error=error, policy_rejected_error=error,
...               reference_chosen_error=error + 0.25, reference_rejected_error=error)  # m = 0.25
>>> float(diffusion_hinge_loss(**arrays, beta=4.0).loss[0]), float(diffusion_ipo_loss(**arrays, beta=1.0).loss[0])
(0.5, 0.0625)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from dpo_jax.diffusion.ops import denoising_error, pair_gains, scaled_gain_metrics
from dpo_jax.ops import logistic_loss, require_between, require_positive, smoothed_logistic_loss
from dpo_jax.types import Array, LossOutput


def diffusion_sft_loss(*, policy_image_error: Array) -> LossOutput:
    """Fine-tuning on single images; CSFT is this loss of `tagged_rows`."""
    return LossOutput(policy_image_error.astype(jnp.float32), {})


def diffusion_sft_chosen_loss(*, policy_chosen_error: Array) -> LossOutput:
    """Fine-tuning on the chosen images of pairs; rows of them alone, with `diffusion_sft_loss`, cost half."""
    return LossOutput(policy_chosen_error.astype(jnp.float32), {})


def diffusion_sft_both_loss(*, policy_chosen_error: Array, policy_rejected_error: Array) -> LossOutput:
    """Fine-tuning on both images: a control that sees the data and not the preference."""
    return LossOutput((policy_chosen_error.astype(jnp.float32) + policy_rejected_error.astype(jnp.float32)) / 2, {})


def diffusion_hinge_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 5000.0,
) -> LossOutput:
    """max(0, 1 - z): pairs with a margin above 1 are left alone.

    Args:
      beta: as in Diffusion-DPO: z is beta / 2 times the margin of mean squared errors.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    return LossOutput(jax.nn.relu(1.0 - 0.5 * beta * gains.margin), scaled_gain_metrics(gains, 0.5 * beta))


def diffusion_ipo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 2500.0,
) -> LossOutput:
    """(m - 1 / (2 beta))^2: the margin of errors is led to a target instead of away.

    Args:
      beta: the target is 1 / (2 beta), for mean squared errors of latents 1e-3 to 2e-4, so 500 to 2500.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    return LossOutput(jnp.square(gains.margin - 1 / (2 * beta)), scaled_gain_metrics(gains, 1.0))


def diffusion_conservative_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 5000.0,
    label_smoothing: float = 0.1,
) -> LossOutput:
    """Diffusion-DPO for labels of which a share is wrong (cDPO): margins end at log((1 - e) / e).

    Args:
      beta: as in Diffusion-DPO.
      label_smoothing: e, share of wrong labels, in [0, 0.5].
    """
    require_positive(beta=beta)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    loss = smoothed_logistic_loss(0.5 * beta * gains.margin, label_smoothing)
    return LossOutput(loss, scaled_gain_metrics(gains, 0.5 * beta))


def diffusion_dpo_sft_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 5000.0,
    sft_coef: float = 1.0,
) -> LossOutput:
    """Diffusion-DPO plus the chosen image's error, which keeps its likelihood up.

    Args:
      beta: as in Diffusion-DPO; 0 leaves fine-tuning on the chosen images.
      sft_coef: weight of the error, at least 0.
    """
    require_between(0.0, float("inf"), beta=beta, sft_coef=sft_coef)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    loss = logistic_loss(0.5 * beta * gains.margin) + sft_coef * policy_chosen_error.astype(jnp.float32)
    return LossOutput(loss, scaled_gain_metrics(gains, 0.5 * beta))


def dspo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    policy_chosen_pred: Array,
    reference_chosen_pred: Array,
    chosen_target: Array,
    beta: float = 0.001,
) -> LossOutput:
    """DSPO: score matching to a target that the preference tilts.

    Args:
      beta: strength of the tilt.
    """
    require_positive(beta=beta)
    chex.assert_equal_shape([policy_chosen_pred, reference_chosen_pred, chosen_target])
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    said = policy_chosen_pred.astype(jnp.float32)
    frozen = jax.lax.stop_gradient(reference_chosen_pred.astype(jnp.float32))
    tilt = beta * jax.nn.sigmoid(-0.5 * beta * gains.margin)  # [B]
    tilt = tilt.reshape(-1, *[1] * (said.ndim - 1))
    return LossOutput(
        denoising_error(said - tilt * (said - frozen), chosen_target), scaled_gain_metrics(gains, 0.5 * beta)
    )


def dspo_threshold_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    policy_chosen_pred: Array,
    reference_chosen_pred: Array,
    beta: float = 5000.0,
    threshold: float = 0.1,
) -> LossOutput:
    """DSPO as a peer trains SDXL with it: a squared 1 - sigma(z), scaled by the way gone once that is long.

    Args:
      beta: as in Diffusion-DPO.
      threshold: of the mean squared difference from the reference's prediction; the loss jumps there.
    """
    require_positive(beta=beta)
    require_between(0.0, float("inf"), threshold=threshold)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    wrong = jax.nn.sigmoid(-0.5 * beta * gains.margin)
    way = denoising_error(policy_chosen_pred, jax.lax.stop_gradient(reference_chosen_pred))
    return LossOutput(jnp.square(wrong) * jnp.where(way >= threshold, way, 1.0), scaled_gain_metrics(gains, 0.5 * beta))


def sdpo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    policy_chosen_pred: Array,
    policy_rejected_pred: Array,
    chosen_target: Array,
    rejected_target: Array,
    weight: Array,
    beta: float = 5000.0,
    mu: float = 0.9,
) -> LossOutput:
    """Diffusion-DPO with the SDPO safeguard; batch-coupled through the scale of the rejected gradient.

    Args:
      beta: as in Diffusion-DPO.
      mu: see `rejected_scale`; 0.9 for Stable Diffusion 1.5, 0.6 for SDXL.
    """
    require_positive(beta=beta)
    scale = rejected_scale(policy_chosen_pred, policy_rejected_pred, chosen_target, rejected_target, weight, mu=mu)
    rejected = scale_gradient(policy_rejected_error.astype(jnp.float32), scale)
    gains = pair_gains(
        policy_chosen_error.astype(jnp.float32), rejected, reference_chosen_error, reference_rejected_error
    )
    loss = logistic_loss(0.5 * beta * gains.margin)
    return LossOutput(loss, scaled_gain_metrics(gains, 0.5 * beta) | {"rejected_scale": jnp.full_like(loss, scale)})


def rejected_scale(
    policy_chosen_pred: Array,
    policy_rejected_pred: Array,
    chosen_target: Array,
    rejected_target: Array,
    weight: Array,
    *,
    mu: float = 0.9,
    largest: float = 1.0,
) -> Array:
    """Scale of the rejected images' gradient with which a step does not raise the chosen error, to first order.

    With g the gradients of the errors by the predictions: (1 - mu) |g_w|^2 / (g_w . g_l), clipped to [0, largest], and
    `largest` where the gradients oppose each other anyway. float32 scalar of the whole batch, a constant.

    Args:
      policy_chosen_pred, policy_rejected_pred, chosen_target, rejected_target: [B, ...].
      weight: [B], 0 for rows to leave out.
      mu: share of the chosen images' progress that is kept, in [0, 1].
      largest: scale without need of a safeguard.
    """
    require_between(0.0, 1.0, mu=mu)
    require_positive(largest=largest)
    there = jax.lax.stop_gradient(weight.astype(jnp.float32)).reshape(-1, *[1] * (policy_chosen_pred.ndim - 1))
    wrong = [
        jax.lax.stop_gradient(there * (said.astype(jnp.float32) - target.astype(jnp.float32)))
        for said, target in ((policy_chosen_pred, chosen_target), (policy_rejected_pred, rejected_target))
    ]
    # Common factors of the gradients cancel; dividing by the largest number keeps squares in float32.
    top = jnp.maximum(jnp.maximum(jnp.max(jnp.abs(wrong[0])), jnp.max(jnp.abs(wrong[1]))), 1e-30)
    chosen, rejected = wrong[0] / top, wrong[1] / top
    along = jnp.mean(chosen * rejected)
    scale = (1 - mu) * jnp.mean(jnp.square(chosen)) / jnp.where(along > 0, along, 1.0)
    return jnp.where(along > 0, jnp.clip(scale, 0.0, largest), largest)


def scale_gradient(values: Array, scale: Array | float) -> Array:
    """The same values, whose gradient is multiplied by a constant."""
    return jax.lax.stop_gradient(values) + scale * (values - jax.lax.stop_gradient(values))


def tagged_rows(
    pairs: Sequence[Mapping[str, Any]], *, good: str = "Good image. ", bad: str = "Bad image. "
) -> list[dict[str, Any]]:
    """Two rows {image, caption, label} for every pair, whose captions say which image was chosen (CSFT); host.

    Samples are then drawn with captions that begin with the good tag.

    Args:
      pairs: mappings with chosen, rejected and caption.
      good, bad: what captions of chosen and rejected images begin with.

    Raises:
      ValueError: a row without one of the three keys.
    """
    rows = []
    for number, pair in enumerate(pairs):
        if missing := [name for name in ("chosen", "rejected", "caption") if name not in pair]:
            raise ValueError(f"row {number} has no {' and no '.join(missing)}; its keys are {sorted(pair)}")
        rows.append({"image": pair["chosen"], "caption": good + pair["caption"], "label": 1})
        rows.append({"image": pair["rejected"], "caption": bad + pair["caption"], "label": 0})
    return rows
