"""Flow-DPO: Diffusion-DPO for models that predict the velocity of straight paths (SD3, FLUX, video).

Liu et al. 2025, "Improving Video Generation with Human Feedback", arXiv 2501.13918. Evidence: the loss with constant
beta, the density of levels, pairs and defaults confirmed from the code that the authors point to; the falling beta is
derived here.

    x = (1 - sigma) x_0 + sigma eps,   L = mean squared error of the velocity eps - x_0
    z = (b / 2) [ (L_ref^w - L_theta^w) - (L_ref^l - L_theta^l) ],   loss = -log sigma(z)

    flow_dpo        b = beta
    flow_dpo_noise  b = beta (1 - sigma)^2: an error of the noise is (1 - sigma)^2 that of the velocity, so this is
                    Diffusion-DPO on errors of the noise

Sigma and the noise are shared by the pair, the targets differ. Errors of velocities are of order one, so betas are
smaller than for Diffusion-DPO. A process without schedule draws sigma as the code does: logit-normal, a thousand
levels, shift 3.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> arrays = dict(policy_chosen_error=error, policy_rejected_error=error,
...               reference_chosen_error=error + 0.02, reference_rejected_error=error)
>>> round(float(flow_dpo_loss(**arrays).loss[0]), 4)  # -log sigma(1)
0.3133
>>> round(float(flow_dpo_noise_loss(**arrays, sigmas=jnp.array([0.5])).metrics["margin"][0]), 4)
0.25
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.ops import pair_gains, scaled_gain_metrics
from dpo_jax.ops import logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput


def flow_dpo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    beta: float = 100.0,
) -> LossOutput:
    """Flow-DPO with the same beta at all levels.

    Args:
      beta: strength of the tie to the reference.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    metrics = scaled_gain_metrics(gains, 0.5 * beta)
    return LossOutput(logistic_loss(0.5 * beta * gains.margin), metrics)


def flow_dpo_noise_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    sigmas: Array,
    beta: float = 100.0,
) -> LossOutput:
    """Flow-DPO whose beta falls with the level, as if errors were those of the noise.

    Args:
      beta: strength of the tie to the reference at sigma = 0.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    scale = 0.5 * beta * jnp.square(1 - jax.lax.stop_gradient(sigmas.astype(jnp.float32)))  # [B]
    metrics = scaled_gain_metrics(gains, scale)
    return LossOutput(logistic_loss(scale * gains.margin), metrics)


class ScoredPairs(NamedTuple):
    """Which images of which prompts make pairs, int [P] each."""

    prompts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def best_and_worst(rewards: np.ndarray) -> ScoredPairs:
    """For online rounds: of each prompt the image with the largest reward against the one with the smallest; host.

    Prompts whose images are all worth the same make no pair; of equal ones the first is taken.

    Args:
      rewards: [prompts, images], at least two images.

    Raises:
      ValueError: another shape, or numbers that are not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not np.isfinite(rewards).all():
        raise ValueError(f"rewards {list(rewards.shape)}; expected finite ones of at least two images for each prompt")
    prompts = np.flatnonzero(rewards.max(axis=1) > rewards.min(axis=1))
    return ScoredPairs(prompts, rewards[prompts].argmax(axis=1), rewards[prompts].argmin(axis=1))
