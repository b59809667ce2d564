"""DenseDPO: segments of videos that share their motion are preferred one by one.

Wu et al. 2025, "DenseDPO: Fine-Grained Temporal Preference Optimization for Video Diffusion Models", arXiv 2506.03517
(NeurIPS 2025). Evidence: the paper's text; no code was released.

    s_k,f = L_theta(frame f of video k) - L_ref(frame f of video k),     k = 0, 1: the sides chosen and rejected
    z     = -beta sum_f l_f (s_0,f - s_1,f) / #{f : l_f != 0},           l_f in {1, 0, -1}: 1 if video 0 is better
    loss  = -log sigmoid(z)

One sigmoid per pair. `dense_dpo_sum_loss` has the sum of the paper's eq. 7 over frames instead of the appendix's mean
over what is no tie. Labels all 1 give Flow-DPO with mean errors (arXiv 2501.13918, constant beta). Ties have no
gradient, and pairs without any label have loss log 2 and none at all: drop them, or give them weight 0.
Both videos start from one partly noised video, so their motion is shared: `guided_pair`.

>>> import jax.numpy as jnp
>>> frames = jnp.zeros((1, 4))
>>> out = dense_dpo_loss(
...     policy_chosen_frame_error=frames - 0.002, policy_rejected_frame_error=frames,
...     reference_chosen_frame_error=frames, reference_rejected_frame_error=frames,
...     segment_labels=jnp.array([[1, 1, 0, 0]]))
>>> round(float(out.loss[0]), 4)
0.3133
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.ops import error_gain, gain_metrics
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import add_noise, denoised, flow_level
from dpo_jax.diffusion.transitions import FLOW_TIME
from dpo_jax.diffusion.types import Parameterisation, Predict
from dpo_jax.ops import logistic_loss, require_between, require_positive, safe_divide
from dpo_jax.types import Array, LossOutput, PyTree


def dense_dpo_inputs(*, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process) -> Inputs:
    """Videos with noise of their own at a shared timestep.

    Args:
      clean, own_noise: [N, F, ...]; times: [N]; condition: leaves [N, ...].
      process: what the models were trained to undo.
    """
    return noised_inputs(clean=clean, noise=own_noise, times=times, condition=condition, process=process)


dense_dpo_sum_inputs = dense_dpo_inputs


def dense_dpo_loss(
    *,
    policy_chosen_frame_error: Array,
    policy_rejected_frame_error: Array,
    reference_chosen_frame_error: Array,
    reference_rejected_frame_error: Array,
    segment_labels: Array,
    beta: float = 500.0,
) -> LossOutput:
    """The loss of DenseDPO with the mean over the frames that are no tie.

    Args:
      policy_chosen_frame_error, policy_rejected_frame_error: [B, F] mean squared errors of latent frames of video 0 and
        of video 1; which is better is said by the labels, not by the name.
      reference_chosen_frame_error, reference_rejected_frame_error: [B, F] the same of the reference; constants.
      segment_labels: [B, F], 1 where video 0 is better, -1 where video 1 is, 0 for ties (`frame_labels`).
      beta: strength of the tie to the reference.

    Returns:
      loss and metrics float32 [B]; rewards are beta times the signed mean gains; `labelled` is the share of the frames
      that are no tie.

    Raises:
      ValueError: beta not positive.
    """
    require_positive(beta=beta)
    labels = _signs(segment_labels)
    count = jnp.sum(jnp.abs(labels), axis=-1)
    chosen, rejected = (
        beta * safe_divide(total, count)
        for total in (
            _labelled_gain(policy_chosen_frame_error, reference_chosen_frame_error, labels),
            _labelled_gain(policy_rejected_frame_error, reference_rejected_frame_error, labels),
        )
    )
    return _output(chosen, rejected, labels)


def dense_dpo_sum_loss(
    *,
    policy_chosen_frame_error: Array,
    policy_rejected_frame_error: Array,
    reference_chosen_frame_error: Array,
    reference_rejected_frame_error: Array,
    segment_labels: Array,
    beta: float = 25.0,
) -> LossOutput:
    """The loss of DenseDPO with the plain sum over frames (arXiv 2506.03517, eq. 7); arguments as in `dense_dpo_loss`.

    Args:
      policy_chosen_frame_error, policy_rejected_frame_error: [B, F].
      reference_chosen_frame_error, reference_rejected_frame_error: [B, F]; constants.
      segment_labels: [B, F].
      beta: as there, divided by the usual number of labelled frames; 25 is 500 with 20 of them.
    """
    require_positive(beta=beta)
    labels = _signs(segment_labels)
    chosen = beta * _labelled_gain(policy_chosen_frame_error, reference_chosen_frame_error, labels)
    rejected = beta * _labelled_gain(policy_rejected_frame_error, reference_rejected_frame_error, labels)
    return _output(chosen, rejected, labels)


def _signs(labels: Array) -> Array:
    return jax.lax.stop_gradient(jnp.sign(labels.astype(jnp.float32)))


def _labelled_gain(policy: Array, reference: Array, labels: Array) -> Array:
    """Sum over frames of the label times the gain, [B, F] -> [B]; what stands at ties is not read."""
    gain = error_gain(policy, reference)
    return jnp.sum(jnp.where(labels != 0, gain, 0.0) * labels, axis=-1)


def _output(chosen: Array, rejected: Array, labels: Array) -> LossOutput:
    metrics = {**gain_metrics(chosen, rejected), "labelled": jnp.mean(jnp.abs(labels), axis=-1)}
    return LossOutput(logistic_loss(chosen - rejected), metrics)


# Data


def guided_pair(
    predict: Predict,
    video: Array,
    noises: tuple[Array, Array],
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    guidance_level: float = 0.75,
    steps: int = 40,
    snap: bool = False,
) -> tuple[Array, Array]:
    """Two videos that straight paths' Euler steps lead from partly noised copies of one, float32 [B, ...] each.

    Args:
      predict: a flow model, guided or not, told 1000 times the level.
      video: [B, ...] clean latents.
      noises: of the two videos, [B, ...] each; equal noises give equal videos.
      condition: leaves [B, ...].
      parameterisation: what the model predicts.
      guidance_level: share of noise in the start, the paper's eta, 0.65 to 0.8, the same for both videos; 0 gives the
        video back and 1 is ordinary sampling.
      steps: of sampling from pure noise; round(guidance_level * steps) of them are done.
      snap: start at the level of the first step; the paper starts at guidance_level, next to it.
    """
    require_between(0.0, 1.0, guidance_level=guidance_level)
    count = round(guidance_level * steps)
    start = count / steps if snap else guidance_level
    levels = jnp.arange(count, 0, -1) / steps

    def rollout(noise: Array) -> Array:
        def step(latents: Array, level: Array):
            times = jnp.full(latents.shape[:1], FLOW_TIME * level)
            clean, noise = denoised(predict(latents, times, condition), latents, flow_level(level), parameterisation)
            return latents - (noise - clean) / steps, None

        return jax.lax.scan(step, add_noise(video, noise, flow_level(jnp.float32(start))), levels)[0]

    return rollout(noises[0]), rollout(noises[1])


def segment_ids(frames: int, length: int) -> np.ndarray:
    """Segment of each frame, int [frames]: frame i belongs to i // length, and the last segment may be short."""
    if length < 1:
        raise ValueError(f"segments of {length} frames; give at least 1")
    return np.arange(frames) // length


def latent_frames(frames: int, stride: int) -> np.ndarray:
    """Last video frame of each latent frame of a causal autoencoder, int: the first latent frame is one frame alone."""
    return np.arange(0, frames, stride)


def frame_labels(labels: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Labels of segments [B, S] repeated for their frames, int32 [B, F]; segments [F] of the latent frames."""
    return np.asarray(labels, np.int32)[:, segments]


def merge_answers(forward: np.ndarray, swapped: np.ndarray) -> np.ndarray:
    """Labels of a judge that was asked twice, int32 of any shape: what both answers agree on, ties elsewhere.

    Args:
      forward: 1 first video, -1 second, 0 tie.
      swapped: the answers with the videos exchanged, in their order.
    """
    forward, swapped = np.asarray(forward, np.int32), np.asarray(swapped, np.int32)
    return np.where(forward == -swapped, forward, 0)


def majority(labels: np.ndarray) -> np.ndarray:
    """Label of the whole pair by majority of its segments [..., S], int32 [...]; 0 if they are even."""
    return np.sign(np.asarray(labels, np.int32).sum(axis=-1)).astype(np.int32)


def labelled_pairs(labels: np.ndarray, *, least: float = 0.2) -> np.ndarray:
    """Indices of the pairs [B, S] whose share of labels other than ties is above `least`."""
    return np.flatnonzero((np.asarray(labels) != 0).mean(axis=-1) > least)
