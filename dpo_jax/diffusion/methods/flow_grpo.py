"""Flow-GRPO, DanceGRPO and MixGRPO: a flow model's sampler made stochastic, groups of images, PPO on their advantages.

Liu et al. 2025, arXiv 2505.05470; Xue et al. 2025 (DanceGRPO), arXiv 2505.07818; MixGRPO, arXiv 2507.21802. Evidence:
confirmed from the official code of all three. The steps are `transitions.flow_sde_steps`: noise scales
`flow_noise_scales` (Flow-GRPO, 0.7) or a constant 0.3 (DanceGRPO). With A the advantage of an image in its group, in
[-5, 5], step log-probabilities divided by the number of elements, and g the mean squared gap of policy's and
reference's step means,

    grpo           mean_j max( -A rho_j, -A clip(rho_j, 1 - c, 1 + c) )
    grpo_kl        the same + beta mean_j g_j / (2 std_j^2)        the transition's exact KL per element
    grpo_code_kl   the same + beta mean_j g_j / (2 k_j^2)          Flow-GRPO's code; std = k sqrt(s - s')

The code's KL is the exact one times s - s', about a tenth of it with ten steps. Steps without noise count nothing.
Advantages: `ops.group_advantages` (floor 1e-4, ddof 0 in Flow-GRPO; 1e-8, 1 in DanceGRPO), `batch_advantages`,
`weighted_advantages` of several rewards. MixGRPO: noise inside a `sliding_window` alone.

>>> import jax.numpy as jnp
>>> steps = dict(policy_step_logps=jnp.zeros((1, 1)), old_step_logps=jnp.zeros((1, 1)), advantages=jnp.array([2.0]))
>>> gap = dict(step_gap=jnp.array([[0.02]]), step_stds=jnp.array([[0.1]]))
>>> float(grpo_loss(**steps).loss[0]), round(float(grpo_kl_loss(**steps, **gap, beta=0.1).loss[0]), 4)  # KL = 1
(-2.0, -1.9)
"""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.ops import Surrogate, clipped_surrogate, group_advantages
from dpo_jax.ops import require_between, require_positive, safe_divide
from dpo_jax.types import Array, LossOutput


def grpo_loss(
    *,
    policy_step_logps: Array,
    old_step_logps: Array,
    advantages: Array,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    advantage_clip: float = 5.0,
) -> LossOutput:
    """The clipped surrogate of recorded steps, without a reference.

    Args:
      policy_step_logps: [B, S] of the recorded steps, divided by the number of elements.
      old_step_logps: [B, S] of the policy that made the rollout; constants.
      advantages: [B], constants.
      clip_low, clip_high: how far the ratio may fall below one and rise above it.
      advantage_clip: largest size of an advantage.

    Raises:
      ValueError: clip_low outside [0, 1], clip_high negative, advantage_clip not positive.
    """
    steps = _surrogate(policy_step_logps, old_step_logps, advantages, clip_low, clip_high, advantage_clip)
    return LossOutput(jnp.mean(steps.loss, axis=-1), _metrics(steps))


def grpo_kl_loss(
    *,
    policy_step_logps: Array,
    old_step_logps: Array,
    step_gap: Array,
    step_stds: Array,
    advantages: Array,
    beta: float = 0.04,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    advantage_clip: float = 5.0,
) -> LossOutput:
    """With the exact KL of the transitions to the reference's, per element.

    Args:
      policy_step_logps, old_step_logps, advantages: as in `grpo_loss`.
      step_gap: [B, S] mean squared differences of policy's and reference's step means.
      step_stds: [B, S] standard deviations of the steps, constants.
      beta: coefficient of the KL; 0.04 or 0.01 in Flow-GRPO, where it belongs to the code's KL.
      clip_low, clip_high: how far the ratio may fall below one and rise above it.
      advantage_clip: largest size of an advantage.

    Raises:
      ValueError: as in `grpo_loss`; beta not positive.
    """
    require_positive(beta=beta)
    steps = _surrogate(policy_step_logps, old_step_logps, advantages, clip_low, clip_high, advantage_clip)
    return _with_penalty(steps, step_gap, step_stds, beta)


def grpo_code_kl_loss(
    *,
    policy_step_logps: Array,
    old_step_logps: Array,
    step_gap: Array,
    noise_scales: Array,
    advantages: Array,
    beta: float = 0.04,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    advantage_clip: float = 5.0,
) -> LossOutput:
    """With the KL of Flow-GRPO's code, which leaves out the length of the step.

    Args:
      policy_step_logps, old_step_logps, advantages: as in `grpo_loss`.
      step_gap: [B, S] mean squared differences of policy's and reference's step means.
      noise_scales: [B, S] k of the recorded steps, a column; constants.
      beta: coefficient of the KL; 0.04 for text and counting, 0.01 for PickScore.
      clip_low, clip_high: how far the ratio may fall below one and rise above it.
      advantage_clip: largest size of an advantage.

    Raises:
      ValueError: as in `grpo_loss`; beta not positive.
    """
    require_positive(beta=beta)
    steps = _surrogate(policy_step_logps, old_step_logps, advantages, clip_low, clip_high, advantage_clip)
    return _with_penalty(steps, step_gap, noise_scales, beta)


def batch_advantages(scores: Array, *, floor: float = 1e-4) -> Array:
    """Scores [P, G] less their group's mean, in deviations of all scores of the batch (Flow-GRPO's `global_std`)."""
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    from_first = scores - scores[:, :1]  # equal scores have a mean without rounding then
    return (from_first - jnp.mean(from_first, axis=1, keepdims=True)) / (jnp.std(scores - scores[0, 0]) + floor)


def weighted_advantages(scores: Array, weights: Array, *, ddof: int = 1, floor: float = 1e-8) -> Array:
    """Weighted sum of the advantages of several rewards, [..., G, R] and [R] -> [..., G] (DanceGRPO, MixGRPO).

    The other way to join them is to sum the rewards before `ops.group_advantages`.
    """
    each = group_advantages(jnp.moveaxis(scores, -1, 0), ddof=ddof, floor=floor)  # [R, ..., G]
    return jnp.tensordot(weights.astype(jnp.float32), each, axes=1)


def sliding_window(iteration: int, *, steps: int, size: int = 4, stride: int = 1, hold: int = 25) -> tuple[int, int]:
    """First and last (exclusive) stochastic step at an iteration of MixGRPO, as `sampler.sample` records it.

    Args:
      iteration: from 0.
      steps: of the sampler.
      size: of the window; shorter at the end of the steps, never empty.
      stride: by how much it moves; after the last start it begins again.
      hold: iterations between moves.

    Raises:
      ValueError: a number below 1, or a window longer than the sampler.
    """
    if min(size, stride, hold) < 1 or size > steps or iteration < 0:
        raise ValueError(f"no window of {size} steps of {steps} by {stride} every {hold} at iteration {iteration}")
    starts = range(0, steps, stride)
    start = starts[iteration // hold % len(starts)]
    return start, min(start + size, steps)


def within_window(noise_scales: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """Noise scales [S] of which those outside of the window are zero: the steps of the ODE there."""
    index = np.arange(len(noise_scales))
    return np.where((index >= window[0]) & (index < window[1]), noise_scales, 0.0)


def _surrogate(
    policy_logps: Array, old_logps: Array, advantages: Array, low: float, high: float, largest: float
) -> Surrogate:
    require_between(0.0, 1.0, clip_low=low)
    require_between(0.0, 1e6, clip_high=high)
    require_positive(advantage_clip=largest)
    held = jnp.clip(advantages.astype(jnp.float32), -largest, largest)[:, None]
    return clipped_surrogate(policy_logps, old_logps, held, 1 - low, 1 + high)


def _metrics(steps: Surrogate) -> dict[str, Array]:
    return {"ratio": jnp.mean(steps.ratio, axis=-1), "clip_share": jnp.mean(steps.clipped, axis=-1)}


def _with_penalty(steps: Surrogate, gap: Array, scales: Array, beta: float) -> LossOutput:
    variance = jnp.square(jax.lax.stop_gradient(scales.astype(jnp.float32)))
    kl = jnp.mean(safe_divide(0.5 * gap.astype(jnp.float32), variance), axis=-1)
    loss = jnp.mean(steps.loss, axis=-1) + beta * kl
    return LossOutput(loss, _metrics(steps) | {"kl": jax.lax.stop_gradient(kl)})
