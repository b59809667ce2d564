"""Small operations that many losses of the diffusion wing share: errors, margins of a pair, their metrics.

An error is a mean squared difference, float32 [B]; a model that explains an image better than the reference has a
smaller one, so log-ratios of likelihoods are differences of errors with the sign turned (arXiv 2311.12908, eq. 14).
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.types import Array

# Log-ratios of one step are held within this: e^20 leaves float32 room, and no method trusts a step that far off.
MAX_LOG_RATIO = 20.0


def denoising_error(prediction: Array, target: Array, *, keep: tuple[int, ...] = ()) -> Array:
    """Mean squared difference over all axes but the first and those kept, float32.

    Args:
      prediction, target: [B, ...], any float dtype.
      keep: axes besides the first that stay, such as that of the frames.
    """
    chex.assert_equal_shape([prediction, target])
    axes = tuple(axis for axis in range(1, prediction.ndim) if axis not in keep)
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)), axis=axes)


class Gains(NamedTuple):
    """How much better than the reference a policy explains the images of a pair, float32 [B].

    Attributes:
      chosen, rejected: reference's error minus policy's.
    """

    chosen: Array
    rejected: Array

    @property
    def margin(self) -> Array:
        """The chosen image's gain above the rejected one's."""
        return self.chosen - self.rejected


def error_gain(policy_error: Array, reference_error: Array) -> Array:
    """Reference's error, a constant, minus the policy's, float32 of their shape; positive if the policy is better."""
    chex.assert_equal_shape([policy_error, reference_error])
    return jax.lax.stop_gradient(reference_error.astype(jnp.float32)) - policy_error.astype(jnp.float32)


def pair_gains(
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
) -> Gains:
    """Gains of both images of a pair; arrays [B]."""
    return Gains(
        error_gain(policy_chosen_error, reference_chosen_error),
        error_gain(policy_rejected_error, reference_rejected_error),
    )


def gain_metrics(chosen_reward: Array, rejected_reward: Array) -> dict[str, Array]:
    """Metrics of a pair's implicit rewards, float32 [B]: both rewards, their margin, and accuracy (strictly larger)."""
    margin = chosen_reward - rejected_reward
    metrics = {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": margin,
        "accuracy": (margin > 0).astype(jnp.float32),
    }
    return {name: jax.lax.stop_gradient(value) for name, value in metrics.items()}


def scaled_gain_metrics(gains: Gains, scale: Array | float) -> dict[str, Array]:
    """Metrics of a pair whose implicit rewards are its gains times a number, or times one per row [B]."""
    return gain_metrics(scale * gains.chosen, scale * gains.rejected)


class LogRatio(NamedTuple):
    """Log-ratios to the reference float32, and one where they were cut off, without gradient."""

    value: Array
    clipped: Array


def clipped_log_ratio(policy_logps: Array, reference_logps: Array, clip: float) -> LogRatio:
    """log(pi / pi_ref) held between log(1 - clip) and log(1 + clip), where its gradient ends.

    Args:
      policy_logps: any shape.
      reference_logps: the same shape, a constant.
      clip: half the width of the interval of ratios; from 1 on nothing is cut off below, and inf clips nothing.

    Raises:
      ValueError: clip is not above 0.
    """
    if not clip > 0:
        raise ValueError(f"ratio_clip is {clip}; give a number above 0, or inf to clip nothing")
    chex.assert_equal_shape([policy_logps, reference_logps])
    ratio = policy_logps.astype(jnp.float32) - jax.lax.stop_gradient(reference_logps.astype(jnp.float32))
    # In log space: the exponential of a ratio overflows, and the gradient of its clipped value is then nan.
    low, high = (math.log(1 - clip) if clip < 1 else -math.inf), math.log1p(clip)
    outside = jax.lax.stop_gradient((ratio < low) | (ratio > high))
    return LogRatio(jnp.clip(ratio, low, high), outside.astype(jnp.float32))


class Surrogate(NamedTuple):
    """PPO's clipped surrogate, each field float32 of the shape of the log-probabilities.

    Attributes:
      loss: max(-A rho, -A clip(rho)).
      ratio: rho, policy's over sampling policy's, without gradient.
      clipped: one where the clipped ratio decides and nothing flows.
    """

    loss: Array
    ratio: Array
    clipped: Array


def clipped_surrogate(
    policy_logps: Array, old_logps: Array, advantages: Array, low: Array | float, high: Array | float
) -> Surrogate:
    """PPO's loss of each action, arXiv 1707.06347, eq. 7, with the sign turned.

    Args:
      policy_logps, old_logps: any shape; those of the policy that drew the actions are constants.
      advantages: broadcasts against them, a constant.
      low, high: bounds of the ratio, numbers or arrays that broadcast.
    """
    chex.assert_equal_shape([policy_logps, old_logps])
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    gap = policy_logps.astype(jnp.float32) - jax.lax.stop_gradient(old_logps.astype(jnp.float32))
    ratio = jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    free, held = -advantages * ratio, -advantages * jnp.clip(ratio, low, high)
    ratio = jax.lax.stop_gradient(ratio)
    outside = (ratio < low) | (ratio > high)
    return Surrogate(jnp.maximum(free, held), ratio, (outside & (held > free)).astype(jnp.float32))


def group_advantages(scores: Array, *, ddof: int = 0, floor: float = 1e-4) -> Array:
    """Scores less their group's mean, in standard deviations of the group, float32 [..., G], constants.

    Args:
      scores: [..., G], one group along the last axis.
      ddof: 0 for the population's deviation, 1 for the unbiased one.
      floor: what is added to the deviation; a group of equal scores has advantages of exactly zero.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    # From the first score on: the mean of equal scores is rounded, and the floor would not hide that.
    scores = scores - scores[..., :1]
    centred = scores - jnp.mean(scores, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / (scores.shape[-1] - ddof)
    return centred / (jnp.sqrt(variance) + floor)
