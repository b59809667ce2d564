"""Small operations that many losses share: masked reductions, stable links, what one completion contributes."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.types import Array

# The largest exponent handed to exp in a loss: e^80 = 5.5e34 leaves float32 room for sums and coefficients.
MAX_EXPONENT = 80.0


def masked_sum(values: Array, mask: Array, axis: int = -1) -> Array:
    """Sum of the values where the mask is not zero, in float32.

    Args:
      values: [..., T], any float dtype; what stands behind a zero of the mask changes neither value nor gradient,
        not even inf or nan.
      mask: [..., T], zero or one (or a weight), any dtype; a constant, no gradient flows into it.
      axis: the axis to sum over.
    """
    mask = jax.lax.stop_gradient(mask.astype(jnp.float32))
    return jnp.sum(jnp.where(mask != 0, values.astype(jnp.float32), 0.0) * mask, axis=axis)


def masked_count(mask: Array, axis: int = -1) -> Array:
    """Sum of the mask in float32: the number of tokens it keeps, or their total weight. No gradient."""
    return jnp.sum(jax.lax.stop_gradient(mask.astype(jnp.float32)), axis=axis)


def masked_mean(values: Array, mask: Array, axis: int = -1) -> Array:
    """Mean of the values where the mask is not zero, in float32; zero where the mask is empty."""
    return safe_divide(masked_sum(values, mask, axis), masked_count(mask, axis))


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """Quotient that is zero, with zero gradient, wherever the denominator is zero."""
    empty = denominator == 0
    # The denominator is replaced before the division: 0 * nan in the backward pass would reach the gradient.
    return jnp.where(empty, 0.0, numerator / jnp.where(empty, 1.0, denominator))


def logistic_loss(logits: Array) -> Array:
    """Negative log-sigmoid, -log sigma(x) = log(1 + e^-x), stable at any size of x."""
    return -jax.nn.log_sigmoid(logits)


def smoothed_logistic_loss(logits: Array, label_smoothing: float) -> Array:
    """Cross-entropy of sigma(x) to a label that is 1 with probability 1 - label_smoothing."""
    return (1 - label_smoothing) * logistic_loss(logits) + label_smoothing * logistic_loss(-logits)


class CompletionSums(NamedTuple):
    """What one completion contributes to most losses; every field float32, the shape of the mask less its last axis.

    Attributes:
      logps: sum of the policy's log-probabilities over the completion's tokens.
      log_ratio: log pi(y|x) / pi_ref(y|x), the sum over tokens; equal to `logps` if there is no reference.
      length: number of tokens |y|.
    """

    logps: Array
    log_ratio: Array
    length: Array


def completion_sums(policy_logps: Array, reference_logps: Array | None, mask: Array) -> CompletionSums:
    """Sums over the tokens of each completion, in float32 whatever the inputs are.

    Args:
      policy_logps: [..., T] log-probability of each completion token.
      reference_logps: [..., T] the same under the reference, a constant (stop_gradient); None for a uniform reference.
      mask: [..., T], one at completion tokens.
    """
    chex.assert_equal_shape([policy_logps, mask])
    logps = masked_sum(policy_logps, mask)
    length = masked_count(mask)
    if reference_logps is None:
        return CompletionSums(logps, logps, length)
    chex.assert_equal_shape([policy_logps, reference_logps])
    reference = jax.lax.stop_gradient(reference_logps.astype(jnp.float32))
    # Differences first, then the sum: two long sums of nearly equal size would cancel and lose the margin.
    return CompletionSums(logps, masked_sum(policy_logps.astype(jnp.float32) - reference, mask), length)


def pair_metrics(
    chosen: CompletionSums, rejected: CompletionSums, chosen_reward: Array, rejected_reward: Array
) -> dict[str, Array]:
    """The metrics that every loss over pairs reports, each float32 [B].

    Args:
      chosen, rejected: sums of the two completions, fields [B].
      chosen_reward, rejected_reward: [B] implicit rewards of the method; accuracy counts strictly larger ones.
    """
    chex.assert_equal_shape([chosen.logps, rejected.logps, chosen_reward, rejected_reward])
    return {
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": chosen_reward - rejected_reward,
        "accuracy": (chosen_reward > rejected_reward).astype(jnp.float32),
        "chosen_logps": chosen.logps,
        "rejected_logps": rejected.logps,
        "chosen_log_ratio": chosen.log_ratio,
        "rejected_log_ratio": rejected.log_ratio,
    }


def require_positive(**values: float) -> None:
    """Raise ValueError unless every hyper-parameter is a finite number above zero."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; give a finite number above 0")


def require_between(low: float, high: float, **values: float) -> None:
    """Raise ValueError unless every hyper-parameter lies in the closed interval [low, high] and is finite."""
    for name, value in values.items():
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; give a finite number in [{low:g}, {high:g}]")
