"""DDPO: policy gradient on the steps of a sampler, whose only reward is that of the final image.

Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301 (ICLR 2024). Evidence:
confirmed from the official PyTorch code. With step log-probabilities divided by the number of elements,

    ddpo      mean_j max( -A rho_j, -A clip(rho_j, 1 - c, 1 + c) ),   rho_j = exp(logp_j - old logp_j),   A in [-5, 5]
    ddpo_sf   mean_j -A logp_j        the score function estimator, for one update per rollout

Where policy and sampling policy agree the ratio is 1 and both have the same gradient. The mean over elements makes log
ratios small, hence c = 1e-4 for latents of 16384 elements; about 0.1 in two dimensions.
Advantages: `track_prompts` with a memory of each prompt's latest rewards, or `ops.group_advantages` of a whole batch.

>>> import jax.numpy as jnp
>>> logps = jnp.log(jnp.array([[1.0, 1.5]]))
>>> out = ddpo_loss(policy_step_logps=logps, old_step_logps=jnp.zeros((1, 2)), advantages=jnp.array([2.0]),
...                 clip_range=0.2)
>>> round(float(out.loss[0]), 4), float(out.metrics["clip_share"][0])  # -(2 + 2.4) / 2
(-2.2, 0.5)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.ops import clipped_surrogate
from dpo_jax.ops import require_between, require_positive
from dpo_jax.types import Array, LossOutput


def ddpo_loss(
    *,
    policy_step_logps: Array,
    old_step_logps: Array,
    advantages: Array,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
) -> LossOutput:
    """DDPO-IS: importance sampling with PPO's clip.

    Args:
      policy_step_logps: [B, S] of the recorded steps, divided by the number of elements.
      old_step_logps: [B, S] of the policy that made the rollout; constants.
      advantages: [B], constants.
      clip_range: c, of the ratio.
      advantage_clip: largest size of an advantage.

    Raises:
      ValueError: clip_range outside [0, 1] or advantage_clip not positive.
    """
    require_between(0.0, 1.0, clip_range=clip_range)
    require_positive(advantage_clip=advantage_clip)
    held = jnp.clip(advantages.astype(jnp.float32), -advantage_clip, advantage_clip)[:, None]
    steps = clipped_surrogate(policy_step_logps, old_step_logps, held, 1 - clip_range, 1 + clip_range)
    gap = jax.lax.stop_gradient(policy_step_logps - old_step_logps).astype(jnp.float32)
    metrics = {"ratio": steps.ratio, "clip_share": steps.clipped, "approximate_kl": 0.5 * jnp.square(gap)}
    return LossOutput(jnp.mean(steps.loss, axis=-1), {name: jnp.mean(x, axis=-1) for name, x in metrics.items()})


def ddpo_sf_loss(*, policy_step_logps: Array, advantages: Array, advantage_clip: float = 5.0) -> LossOutput:
    """DDPO-SF: the score function estimator, unbiased only for the rollouts of the present policy.

    Args:
      policy_step_logps: [B, S] of the recorded steps, divided by the number of elements.
      advantages: [B], constants.
      advantage_clip: largest size of an advantage.

    Raises:
      ValueError: advantage_clip not positive.
    """
    require_positive(advantage_clip=advantage_clip)
    held = jax.lax.stop_gradient(jnp.clip(advantages.astype(jnp.float32), -advantage_clip, advantage_clip))
    logps = jnp.mean(policy_step_logps.astype(jnp.float32), axis=-1)
    return LossOutput(-held * logps, {"step_logps": jax.lax.stop_gradient(logps)})


class PromptMemory(NamedTuple):
    """The latest rewards of each prompt.

    Attributes:
      rewards: float32 [P, size], written in turn.
      count: int32 [P], rewards ever seen.
    """

    rewards: Array
    count: Array


def prompt_memory(prompts: int, *, size: int = 16) -> PromptMemory:
    """An empty memory of so many rewards for each of some prompts."""
    return PromptMemory(jnp.zeros((prompts, size), jnp.float32), jnp.zeros(prompts, jnp.int32))


class Tracked(NamedTuple):
    """What `track_prompts` returns: the memory with the new rewards in it, and their advantages float32 [B]."""

    memory: PromptMemory
    advantages: Array


def track_prompts(memory: PromptMemory, prompts: Array, rewards: Array, *, least: int = 16) -> Tracked:
    """Rewards in deviations of their prompt's latest ones, the new ones among them.

    A prompt with fewer than `least` remembered rewards takes mean and deviation of the batch.

    Args:
      prompts: int [B], places in the memory.
      rewards: [B].
      least: number of remembered rewards from which a prompt's own statistics count; at most the memory's size.

    Raises:
      ValueError: `least` is not within [1, size].
    """
    size = memory.rewards.shape[1]
    if not 1 <= least <= size:
        raise ValueError(f"least is {least} of a memory of {size} rewards; give 1 to {size}")
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.float32))
    same = prompts[:, None] == prompts[None, :]
    earlier = jnp.sum(jnp.tril(same, -1), axis=1)  # rewards of the same prompt before this one in the batch
    later = jnp.sum(jnp.triu(same, 1), axis=1)
    place = (memory.count[prompts] + earlier) % size
    place = jnp.where(later < size, place, size)  # beyond the end: overwritten within this batch already
    table = memory.rewards.at[prompts, place].set(rewards, mode="drop")
    count = memory.count.at[prompts].add(1)
    there = jnp.arange(size) < count[:, None]  # [P, size]
    known = jnp.maximum(jnp.sum(there, axis=1), 1)
    mean = jnp.sum(jnp.where(there, table, 0.0), axis=1) / known
    spread = jnp.sqrt(jnp.sum(jnp.where(there, jnp.square(table - mean[:, None]), 0.0), axis=1) / known)
    own = (count >= least)[prompts]
    mean = jnp.where(own, mean[prompts], jnp.mean(rewards))
    spread = jnp.where(own, spread[prompts], jnp.std(rewards))
    return Tracked(PromptMemory(table, count), (rewards - mean) / (spread + 1e-6))
