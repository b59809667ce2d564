"""D3PO: every denoising step is an action, and each takes the preference between the two final images as its label.

Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", arXiv 2311.13231 (CVPR
2024). Evidence: confirmed from the official code. Log-probabilities of steps are divided by the number of elements:

    d_k  = clip( log p_theta(x^k_{j+1} | x^k_j) - log p_ref(x^k_{j+1} | x^k_j),  log(1 - eps), log(1 + eps) ),  k = 0, 1
    loss = mean_j -log sigmoid( beta h (d_0 - d_1) ),   h = 1 if image 0 is preferred, -1 if image 1 is, 0 for a tie

The code clips the ratio itself; in log space the value is the same and nothing overflows. Beyond the interval a step
has no gradient. Both trajectories start from one noise and are judged as recorded, never drawn anew.
Reduces to: DPO on summed log-densities for one step, without the clip and with beta times the number of elements.
With the defaults the loss lies in [0.6827, 0.7038] and says little; watch `clip_share` and the rewards.

>>> import jax.numpy as jnp
>>> steps = jnp.zeros((1, 2))
>>> out = d3po_loss(
...     policy_chosen_step_logps=steps + 0.05, policy_rejected_step_logps=steps - 1.0,
...     reference_chosen_step_logps=steps, reference_rejected_step_logps=steps,
...     preference=jnp.array([1]), beta=10.0)
>>> round(float(out.loss[0]), 4), float(out.metrics["clip_share"][0])  # 10 (0.05 - log 0.9) = 1.5536
(0.1918, 0.5)
"""

from itertools import combinations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.ops import clipped_log_ratio, gain_metrics
from dpo_jax.ops import logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput


def d3po_loss(
    *,
    policy_chosen_step_logps: Array,
    policy_rejected_step_logps: Array,
    reference_chosen_step_logps: Array,
    reference_rejected_step_logps: Array,
    preference: Array,
    beta: float = 0.1,
    ratio_clip: float = 0.1,
) -> LossOutput:
    """The loss of D3PO, a mean over the steps of two trajectories.

    Args:
      policy_chosen_step_logps, policy_rejected_step_logps: [B, S] of the steps of images 0 and 1, each divided by the
        number of elements.
      reference_chosen_step_logps, reference_rejected_step_logps: [B, S] the same of the reference; constants.
      preference: [B], 1 where image 0 is preferred, -1 where image 1 is, 0 for a tie, which teaches nothing.
      beta: strength of the tie to the reference.
      ratio_clip: eps, half the width of the trusted interval of ratios; inf trusts all.

    Returns:
      loss and metrics float32 [B]; rewards are beta times the steps' mean clipped log-ratio, of the preferred image and
      of the other one.

    Raises:
      ValueError: beta or ratio_clip not positive.
    """
    require_positive(beta=beta)
    first, second = (
        clipped_log_ratio(policy, reference, ratio_clip)
        for policy, reference in (
            (policy_chosen_step_logps, reference_chosen_step_logps),
            (policy_rejected_step_logps, reference_rejected_step_logps),
        )
    )
    sign = jax.lax.stop_gradient(preference.astype(jnp.float32))[:, None]
    loss = jnp.mean(logistic_loss(beta * sign * (first.value - second.value)), axis=-1)  # [B, S] -> [B]
    upper = jnp.where(sign < 0, second.value, first.value)
    lower = jnp.where(sign < 0, first.value, second.value)
    metrics = gain_metrics(beta * jnp.mean(upper, axis=-1), beta * jnp.mean(lower, axis=-1))
    clip_share = 0.5 * jnp.mean(first.clipped + second.clipped, axis=-1)
    return LossOutput(loss, metrics | {"clip_share": clip_share})


def pairs_from_scores(scores: np.ndarray) -> np.ndarray:
    """Pairs of images [K] with different scores, int [M, 2], the better one first; annotators are averaged before."""
    scores = np.asarray(scores)
    pairs = [
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in combinations(range(len(scores)), 2)
        if scores[i] != scores[j]
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def pareto_preference(first: Array, second: Array) -> Array:
    """Preference of several rewards at once, float32 [B]: the winner is nowhere worse and somewhere better.

    Args:
      first, second: [B, R] rewards of images 0 and 1.

    Returns:
      1 where image 0 dominates, -1 where image 1 does, 0 where neither does.
    """
    chex.assert_equal_shape([first, second])
    gap = first.astype(jnp.float32) - second.astype(jnp.float32)
    above, below = jnp.any(gap > 0, axis=-1), jnp.any(gap < 0, axis=-1)
    return (above & ~below).astype(jnp.float32) - (below & ~above).astype(jnp.float32)
