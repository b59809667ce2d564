"""TailorPO: both members of a pair come from one state, and the reward of a step is that of the image it points at.

Ren et al. 2025, "Refining Alignment Framework for Diffusion Models with Intermediate-Step Preference Ranking", arXiv
2502.01667. Evidence: the setting from the abstract and summaries; formulas and hyper-parameters are reconstructed.
With x_w, x_l the better and the worse of two next states of x_t, log-probabilities divided by the number of elements,

    r_t(x)     = r( x0hat(x, t) ),  the reward of the predicted clean image
    d_k        = log p_theta(x_k | x_t) - log p_ref(x_k | x_t),   k = w, l
    tailorpo   = -log sigmoid( beta (d_w - d_l) )
    TailorPO-G: before, x_w <- x_w + eta (r_high - r_t(x_w)) grad r_t(x_w)

The gradient in the predicted mean is -(1 - sigmoid(z)) beta (x_w - x_l) / (std^2 elements), whatever the mean is.
Candidates and rewards are constants. Reduces to: SPO without the ratio's clip; D3PO's step where both states are one.

>>> import jax.numpy as jnp
>>> step = jnp.zeros((1, 1))
>>> out = tailorpo_loss(policy_chosen_step_logps=step + 1.0, policy_rejected_step_logps=step,
...                     reference_chosen_step_logps=step, reference_rejected_step_logps=step)
>>> round(float(out.loss[0]), 4)
0.3133
>>> guide_towards(jnp.array([[1.0]]), lambda x: -x[:, 0] ** 2, target=0.0, guidance_scale=0.1)  # 1 + 0.1 * 1 * -2
Array([[0.8]], dtype=float32)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.ops import clipped_log_ratio, gain_metrics
from dpo_jax.diffusion.pools import Follow, PoolSample, Score, follow_best, pool_rollout
from dpo_jax.diffusion.sampler import denoise
from dpo_jax.diffusion.schedule import per_example
from dpo_jax.diffusion.types import Parameterisation, Predict, Step
from dpo_jax.ops import logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def tailorpo_loss(
    *,
    policy_chosen_step_logps: Array,
    policy_rejected_step_logps: Array,
    reference_chosen_step_logps: Array,
    reference_rejected_step_logps: Array,
    beta: float = 1.0,
) -> LossOutput:
    """The loss of TailorPO, a mean over the steps of a row (rows of `pools.pair_rows` have one).

    Args:
      policy_chosen_step_logps, policy_rejected_step_logps: [B, S] of the better and the worse next state, each divided
        by the number of elements.
      reference_chosen_step_logps, reference_rejected_step_logps: [B, S] the same of the reference; constants.
      beta: strength of the tie to the reference.

    Returns:
      loss and metrics float32 [B]; rewards are beta times the steps' mean log-ratio.

    Raises:
      ValueError: beta not positive.
    """
    require_positive(beta=beta)
    chosen = clipped_log_ratio(policy_chosen_step_logps, reference_chosen_step_logps, jnp.inf).value
    rejected = clipped_log_ratio(policy_rejected_step_logps, reference_rejected_step_logps, jnp.inf).value
    loss = jnp.mean(logistic_loss(beta * (chosen - rejected)), axis=-1)
    return LossOutput(loss, gain_metrics(beta * jnp.mean(chosen, axis=-1), beta * jnp.mean(rejected, axis=-1)))


def step_reward(
    predict: Predict, latents: Array, step: Step, condition: PyTree, *, parameterisation: Parameterisation, score: Score
) -> Array:
    """Reward of the clean latents that the model sees behind noisy ones, [B]; exact for Gaussian data, linear rewards.

    Args:
      predict: the model.
      latents: [B, ...] at the level of the step.
      step: one step, fields [] or [B].
      condition: leaves [B, ...].
      parameterisation: what the model predicts.
      score: reward of clean latents, given timesteps and condition too.
    """
    times = jnp.broadcast_to(jnp.asarray(step.time, jnp.float32), latents.shape[:1])
    return score(denoise(predict, latents, step, condition, parameterisation).clean, times, condition)


def guide_towards(
    latents: Array,
    reward: Callable[[Array], Array],
    std: Array | float = 1.0,
    *,
    target: float,
    guidance_scale: float = 0.5,
    largest: float = jnp.inf,
) -> Array:
    """Latents [B, ...] moved towards a target reward: x + scale (target - r(x)) grad r(x), a constant.

    Args:
      latents: [B, ...].
      reward: [B, ...] -> [B], differentiable, each row's own.
      std: of the step that drew the latents, a number or [B].
      target: r_high, above the rewards of the day.
      guidance_scale: eta; 0 moves nothing.
      largest: of the displacement's length, in std times the root of the number of elements; far from the step's mean
        the log-probability of what was moved would be hugely negative.
    """

    def total(x: Array) -> tuple[Array, Array]:
        rewards = reward(x)
        return jnp.sum(rewards), rewards

    slope, rewards = jax.grad(total, has_aux=True)(latents)
    move = guidance_scale * per_example(target - rewards, latents) * slope
    length = jnp.sqrt(jnp.mean(jnp.square(move), axis=tuple(range(1, move.ndim))))
    # 0 / 0 for latents at rest: a length of zero needs no shortening.
    share = jnp.minimum(1.0, largest * jnp.asarray(std, jnp.float32) / jnp.where(length == 0, 1.0, length))
    return jax.lax.stop_gradient(latents + per_example(share, latents) * move)


def tailorpo_rollout(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    score: Score,
    key: Array,
    start: int = 5,
    follow: Follow = follow_best,
    guide: Callable[[Array, Callable[[Array], Array], Array], Array] | None = None,
) -> PoolSample:
    """Sample with two candidates at each step and keep them ranked, see `pools.pool_rollout`.

    Args:
      predict, latents, steps, condition, parameterisation, key: as there.
      score: the reward, of predicted clean latents.
      start: ordinary steps before the first pair; 5 of 20 leave timesteps up to about 750.
      follow: which candidate comes next.
      guide: TailorPO-G: `guide_towards` with its options bound; moves the better candidate, from which the rollout
        goes on.
    """
    return pool_rollout(
        predict, latents, steps, condition, parameterisation=parameterisation, score=score, key=key,
        candidates=2, start=start, threshold=0.0, follow=follow, refine=guide,
    )  # fmt: skip
