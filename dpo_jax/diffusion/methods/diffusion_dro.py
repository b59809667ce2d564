"""Diffusion-DRO: expert images must rank above the policy's own samples; no pairs, no reward model.

Wu et al. 2025, "Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback", arXiv
2510.18353 (NeurIPS 2025). Evidence: confirmed from the official code and the paper's text. With mean squared errors of
the trained network and of the reference on a noised expert image, and on a state of the policy's own rollout whose
target is what the policy predicted there,

    loss = max( 0, margin + (e_expert - e_ref_expert) - (e_sampled - e_ref_sampled) )

The paper's form max(m, ...) with m = -margin is this one less the margin. Both halves share prompt and timestep. Once
an expert leads by the margin its row teaches nothing. Where network, reference and policy agree the loss is the margin
and the sampled half has no gradient: its error is zero there, a point that repels.
Reduces to: fine-tuning with a hinge without the sampled half.

A turn: `dro_rollout` of the lagging policy on `perturbed_timesteps` with `dpm_solver_steps`, rows pushed into a
`TrajectoryBuffer`, `draw_states` of it as columns of the experts' rows, an update, and policy <- network now and then.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> float(dro_loss(policy_expert_error=error - 0.25, reference_expert_error=error,
...     policy_sampled_error=error, reference_sampled_error=error + 0.5, margin=1.0).loss[0])
1.25
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.ops import error_gain
from dpo_jax.diffusion.process import Process, level_of
from dpo_jax.diffusion.sampler import denoise, require_clean
from dpo_jax.diffusion.schedule import denoised, prediction_target, predicts_noise
from dpo_jax.diffusion.transitions import draw, transition
from dpo_jax.diffusion.types import Parameterisation, Predict, Step
from dpo_jax.ops import require_between
from dpo_jax.types import Array, LossOutput, PyTree


def dro_loss(
    *,
    policy_expert_error: Array,
    reference_expert_error: Array,
    policy_sampled_error: Array,
    reference_sampled_error: Array,
    margin: float = 1e-3,
) -> LossOutput:
    """The hinge of Diffusion-DRO.

    Args:
      policy_expert_error, reference_expert_error: [B] mean squared errors on noised expert images; the reference's are
        constants.
      policy_sampled_error, reference_sampled_error: [B] the same on the policy's own states, whose targets are its
        predictions there.
      margin: lead from which an expert's row is left alone.

    Returns:
      loss and metrics float32 [B]: `expert_gain` and `sampled_gain` over the reference, `active` where the hinge is.

    Raises:
      ValueError: margin negative or not finite.
    """
    require_between(0.0, 1e6, margin=margin)
    expert = error_gain(policy_expert_error, reference_expert_error)
    sampled = error_gain(policy_sampled_error, reference_sampled_error)
    gap = margin - expert + sampled
    metrics = {"expert_gain": expert, "sampled_gain": sampled, "active": (gap > 0).astype(jnp.float32)}
    return LossOutput(jax.nn.relu(gap), jax.lax.stop_gradient(metrics))


def dro_inputs(
    *,
    clean: Array,
    own_noise: Array,
    condition: PyTree,
    process: Process,
    images: int,
    sampled_latents: Array,
    sampled_noise: Array,
    sampled_times: Array,
) -> Inputs:
    """The expert noised at the timestep of a recorded state, and beside it that state.

    Args:
      clean, own_noise: [N, ...]; the first image of each row is the expert.
      condition: leaves [N, ...].
      process: what the models were trained to undo.
      images: of a row.
      sampled_latents: [B, ...] states of the policy's rollouts, a column.
      sampled_noise: [B, ...] noise that the policy predicted there; at levels without signal it is the whole target.
      sampled_times: [B] timesteps there.
    """
    experts = slice(None, None, images)
    told = jax.tree.map(lambda leaf: leaf[experts], condition)
    expert = noised_inputs(
        clean=clean[experts], noise=own_noise[experts], times=sampled_times, condition=told, process=process
    )
    level = level_of(process, sampled_times)
    said = denoised(sampled_noise, sampled_latents, level, predicts_noise)
    target = prediction_target(said.clean, sampled_noise, level, process.parameterisation)

    def beside(one: Array, other: Array) -> Array:
        return jnp.stack([one, other.astype(one.dtype)], axis=1).reshape(-1, *one.shape[1:])  # [2 B, ...]

    return Inputs(
        latents=beside(expert.latents, sampled_latents),
        times=jnp.repeat(sampled_times.astype(jnp.float32), 2),
        target=beside(expert.target, target),
        condition=jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), told),
    )


def perturbed_timesteps(key: Array, *, steps: int, rows: int, timesteps: int = 1000) -> np.ndarray:
    """A falling grid for each row, int [S, B]: an even one, shifted up by one whole number below its spacing."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"{steps} sampling steps of {timesteps} timesteps; give 1 to {timesteps}")
    spacing = timesteps // steps
    shift = np.asarray(jax.random.randint(key, (rows,), 0, spacing))
    return np.arange(steps)[::-1, None] * spacing + shift


class States(NamedTuple):
    """States of rollouts, constants; in a trajectory each leaf has an axis of steps behind the rows.

    Attributes:
      latents: float32 [B, S, ...] before each step.
      noise: float32 [B, S, ...], predicted there.
      times: float32 [B, S].
    """

    latents: Array
    noise: Array
    times: Array


def dro_rollout(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    key: Array | None = None,
) -> States:
    """Sample, and keep every state with what the model said there.

    Args:
      predict, latents, steps, condition, parameterisation: as in `sampler.sample`.
      key: needed by stochastic tables.

    Raises:
      ValueError: no key for a stochastic table.
    """
    if steps.std is not None and key is None:
        raise ValueError("the sampler adds noise; give a key, or a deterministic table")
    require_clean(steps, parameterisation)
    keys = None if key is None else jax.random.split(key, len(steps.time))
    start = latents.astype(jnp.float32)

    def advance(carry: tuple[Array, Array], inputs: tuple[Step, Array | None]):
        state, previous = carry
        step, step_key = inputs
        said = denoise(predict, state, step, condition, parameterisation)
        given = transition(step, said, previous)
        after = given.mean if step_key is None else draw(given, step_key)
        times = jnp.broadcast_to(jnp.asarray(step.time, jnp.float32), state.shape[:1])
        return (after, said.clean), States(state, said.noise, times)

    _, kept = jax.lax.scan(advance, (start, jnp.zeros_like(start)), (steps, keys))
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), kept))


class TrajectoryBuffer(NamedTuple):
    """The latest trajectories, first in first out.

    Attributes:
      entries: pytree, leaves [size, ...]: the `States` of a trajectory, the expert's latents, the condition, ...
      count: int32 [], trajectories ever pushed.
    """

    entries: PyTree
    count: Array


def empty_buffer(example: PyTree, *, size: int) -> TrajectoryBuffer:
    """A buffer of some trajectories like those of the example, leaves [n, ...]."""
    entries = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape[1:]), leaf.dtype), example)
    return TrajectoryBuffer(entries, jnp.zeros((), jnp.int32))


def push(buffer: TrajectoryBuffer, trajectories: PyTree) -> TrajectoryBuffer:
    """The buffer with new trajectories, leaves [n, ...], in the places of the oldest ones.

    Raises:
      ValueError: more new ones than the buffer holds.
    """
    size, new = len(jax.tree.leaves(buffer.entries)[0]), len(jax.tree.leaves(trajectories)[0])
    if new > size:
        raise ValueError(f"{new} trajectories for a buffer of {size}; give fewer at a time or a larger buffer")
    places = (buffer.count + jnp.arange(new)) % size
    entries = jax.tree.map(lambda held, leaf: held.at[places].set(leaf), buffer.entries, trajectories)
    return TrajectoryBuffer(entries, buffer.count + new)


class Drawn(NamedTuple):
    """Trajectories of a buffer, leaves [B, ...], and the step drawn of each, int [B]."""

    entries: PyTree
    steps: Array


def draw_states(buffer: TrajectoryBuffer, key: Array, *, rows: int, steps: int) -> Drawn:
    """Rows drawn evenly from the trajectories there are and from their steps; see `at_steps`."""
    size = len(jax.tree.leaves(buffer.entries)[0])
    place_key, step_key = jax.random.split(key)
    places = jax.random.randint(place_key, (rows,), 0, jnp.minimum(buffer.count, size))
    entries = jax.tree.map(lambda leaf: leaf[places], buffer.entries)
    return Drawn(entries, jax.random.randint(step_key, (rows,), 0, steps))


def at_steps(states: States, steps: Array) -> States:
    """One step of each trajectory: leaves [B, S, ...] and int [B] -> [B, ...]."""
    return jax.tree.map(lambda leaf: leaf[jnp.arange(len(steps)), steps], states)


def select_experts(scores: np.ndarray, *, top: int = 500) -> np.ndarray:
    """Places of the images with the highest scores, int [top], the best first; ties in order."""
    return np.argsort(-np.asarray(scores, np.float64), kind="stable")[:top]
