"""Small operations that many losses of the diffusion wing share: errors, margins of a pair, their metrics.

An error is a mean squared difference, float32 [B]; a model that explains an image better than the reference has a
smaller one, so log-ratios of likelihoods are differences of errors with the sign turned (arXiv 2311.12908, eq. 14).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.types import Array


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
