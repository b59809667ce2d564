"""CaPO: the implicit reward gap of a pair is fitted to a calibrated one, from several reward models at once.

Lee et al. 2025, "Calibrated Multi-Preference Optimization for Aligning Diffusion Models", arXiv 2502.02588. Evidence:
calibration, loss, dominance, level weights and tables from summaries of the paper; the lower frontier, the place of the
weight and beta are reconstructed.

    calibrated  R_i = mean over the other samples l of sigma(R_i - R_l), for each reward model
    pairs       chosen: a sample that no other dominates; rejected: one that dominates no other; none is both
    gap         mean over reward models of the calibrated difference
    R_theta     = w_t (L_ref - L_theta),   L = mean squared error of the prediction
    w_t         = sigma(bias - log SNR_t), more for noisier levels

    capo              (gap - beta (R_theta^+ - R_theta^-))^2
    capo_unweighted   the same with w_t = 1
    capo_outer_weight w_t times the square, w_t = 1 inside

Each image has its own noise. The optimum is bounded, unlike DPO's: the gap in errors that is reached is gap / beta,
so beta is far below Diffusion-DPO's (2 against 20 in two dimensions). gap = 1 is IPO times beta^2.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> arrays = dict(policy_chosen_error=error, policy_rejected_error=error,
...               reference_chosen_error=error + 0.25, reference_rejected_error=error, reward_gap=jnp.array([0.75]))
>>> float(capo_unweighted_loss(**arrays, beta=1.0).loss[0])
0.25
>>> calibrated_rewards(np.array([[0.0, 0.0, 0.0]])).tolist()
[[0.5, 0.5, 0.5]]
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.ops import Gains, pair_gains, scaled_gain_metrics
from dpo_jax.diffusion.process import Process
from dpo_jax.ops import require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def capo_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    reward_gap: Array,
    log_snr: Array,
    beta: float = 1000.0,
    bias: float = 1.5,
) -> LossOutput:
    """CaPO, with the level's weight inside the implicit reward.

    Args:
      reward_gap: [B] calibrated gap between chosen and rejected, in (-1, 1).
      beta: the gap in errors is led to reward_gap / beta.
      bias: log SNR at which the weight is one half.
    """
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    weights = level_weights(log_snr, bias=bias)
    residual, metrics = _residual(Gains(weights * gains.chosen, weights * gains.rejected), reward_gap, beta)
    return LossOutput(jnp.square(residual), metrics)


def capo_unweighted_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    reward_gap: Array,
    beta: float = 1000.0,
) -> LossOutput:
    """CaPO with all levels alike.

    Args:
      reward_gap: [B] calibrated gap between chosen and rejected, in (-1, 1).
      beta: the gap in errors is led to reward_gap / beta.
    """
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    residual, metrics = _residual(gains, reward_gap, beta)
    return LossOutput(jnp.square(residual), metrics)


def capo_outer_weight_loss(
    *,
    policy_chosen_error: Array,
    policy_rejected_error: Array,
    reference_chosen_error: Array,
    reference_rejected_error: Array,
    reward_gap: Array,
    log_snr: Array,
    beta: float = 1000.0,
    bias: float = 1.5,
) -> LossOutput:
    """CaPO with the level's weight on the squared residual.

    Args:
      reward_gap: [B] calibrated gap between chosen and rejected, in (-1, 1).
      beta: the gap in errors is led to reward_gap / beta.
      bias: log SNR at which the weight is one half.
    """
    gains = pair_gains(policy_chosen_error, policy_rejected_error, reference_chosen_error, reference_rejected_error)
    residual, metrics = _residual(gains, reward_gap, beta)
    return LossOutput(level_weights(log_snr, bias=bias) * jnp.square(residual), metrics)


def capo_inputs(*, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process) -> Inputs:
    """Each image has noise of its own."""
    return noised_inputs(clean=clean, noise=own_noise, times=times, condition=condition, process=process)


def capo_unweighted_inputs(
    *, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process
) -> Inputs:
    """The inputs of CaPO."""
    return capo_inputs(clean=clean, own_noise=own_noise, times=times, condition=condition, process=process)


def capo_outer_weight_inputs(
    *, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process
) -> Inputs:
    """The inputs of CaPO."""
    return capo_inputs(clean=clean, own_noise=own_noise, times=times, condition=condition, process=process)


def level_weights(log_snr: Array, *, bias: float = 1.5) -> Array:
    """sigma(bias - log SNR), float32, constants; near 1 where there is much noise."""
    return jax.nn.sigmoid(bias - jax.lax.stop_gradient(log_snr.astype(jnp.float32)))


def calibrated_rewards(rewards: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Expected win rate of each sample against samples of the pretrained model, float64 [L, N]; host.

    Rewards must be log-odds: multiply PickScore-like ones by their logit scale first.

    Args:
      rewards: [L, N] of L reward models for N samples of a prompt.
      others: [L, M] of other samples of the pretrained model; if None, samples are compared among themselves (N > 1),
        each with the N - 1 others.

    Raises:
      ValueError: nothing to compare with.
    """
    rewards = np.asarray(rewards, np.float64)
    against = rewards if others is None else np.asarray(others, np.float64)
    if rewards.ndim != 2 or against.shape[:1] != rewards.shape[:1] or against.shape[1] < (2 if others is None else 1):
        raise ValueError(f"rewards {list(rewards.shape)} against {list(against.shape)}; expected [L, N] and others")
    wins = 0.5 * (1 + np.tanh(0.5 * (rewards[:, :, None] - against[:, None, :])))  # [L, N, M]
    if others is None:
        return (wins.sum(axis=-1) - 0.5) / (rewards.shape[1] - 1)  # a sample against itself is 0.5
    return wins.mean(axis=-1)


class Frontiers(NamedTuple):
    """Samples of a prompt, by index, from which pairs are drawn; either may be empty.

    Attributes:
      chosen: those that no other sample dominates, and that dominate one.
      rejected: those that dominate none, and that one dominates.
    """

    chosen: np.ndarray
    rejected: np.ndarray


def pareto_frontiers(rewards: np.ndarray) -> Frontiers:
    """Frontier-based rejection sampling; host. With one reward model these are all best and all worst samples.

    Args:
      rewards: [L, N]; calibrated or not, the frontiers are the same.
    """
    table = np.asarray(rewards, np.float64)
    at_least = (table[:, :, None] >= table[:, None, :]).all(axis=0)  # [N, N]: row over column
    dominates = at_least & ~at_least.T
    upper, lower = ~dominates.any(axis=0), ~dominates.any(axis=-1)
    return Frontiers(np.flatnonzero(upper & ~lower), np.flatnonzero(lower & ~upper))


class DrawnPair(NamedTuple):
    """Indices of a chosen and a rejected sample, and their calibrated gap (the mean over reward models)."""

    chosen: int
    rejected: int
    reward_gap: float


def draw_pair(calibrated: np.ndarray, *, random: np.random.Generator) -> DrawnPair | None:
    """One pair of a prompt's samples, drawn from its frontiers; None where they are empty. Host.

    Args:
      calibrated: [L, N].
    """
    frontiers = pareto_frontiers(calibrated)
    if not len(frontiers.chosen) or not len(frontiers.rejected):
        return None
    chosen, rejected = int(random.choice(frontiers.chosen)), int(random.choice(frontiers.rejected))
    mean = np.asarray(calibrated, np.float64).mean(axis=0)
    return DrawnPair(chosen, rejected, float(mean[chosen] - mean[rejected]))


def _residual(rewards: Gains, reward_gap: Array, beta: float) -> tuple[Array, dict[str, Array]]:
    require_positive(beta=beta)
    chex.assert_equal_shape([rewards.chosen, reward_gap])
    residual = jax.lax.stop_gradient(reward_gap.astype(jnp.float32)) - beta * rewards.margin
    metrics = scaled_gain_metrics(rewards, beta)
    return residual, metrics | {"residual": jax.lax.stop_gradient(residual)}
