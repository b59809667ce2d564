"""The process that a model was trained to undo: which levels there are, how they are drawn, what the model is told."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.schedule import Schedule, flow_level, level_at, shift_sigmas
from dpo_jax.diffusion.transitions import FLOW_TIME
from dpo_jax.diffusion.types import Level, Parameterisation, TextCondition
from dpo_jax.ops import require_positive
from dpo_jax.types import Array, PyTree

# draw(key, shape) -> float32 numbers in [0, 1), the share of the way from clean latents to noise.
Density = Callable[[Array, tuple[int, ...]], Array]


def uniform_density(key: Array, shape: tuple[int, ...]) -> Array:
    """All levels alike."""
    return jax.random.uniform(key, shape)


def logit_normal_density(key: Array, shape: tuple[int, ...], *, mean: float = 0.0, deviation: float = 1.0) -> Array:
    """Levels in the middle more often: the sigmoid of a normal number (arXiv 2403.03206, section 3.1).

    `functools.partial(logit_normal_density, mean=1.0)` is a process's density that draws noisier levels.

    Raises:
      ValueError: deviation not positive.
    """
    require_positive(deviation=deviation)
    return jax.nn.sigmoid(mean + deviation * jax.random.normal(key, shape))


@dataclass(frozen=True, eq=False)
class Process:
    """What a model was trained to undo. Hashed by identity, as its schedule is.

    Attributes:
      parameterisation: what the model predicts.
      schedule: of a variance-preserving process; None for straight paths (flow models).
      shift: of the levels that are drawn on straight paths; 3 for Stable Diffusion 3.
      density: how levels are drawn; uniform over a schedule's timesteps, logit-normal on straight paths.
      timestep_map: of drawn timesteps (few-step models are trained at some only); the timestep itself by default.
      empty: condition of the empty prompt, leaves [1, ...], for guidance and for methods that name it.
    """

    parameterisation: Parameterisation
    schedule: Schedule | None = None
    shift: float = 1.0
    density: Density | None = None
    timestep_map: Callable[[Array], Array] | None = None
    empty: PyTree = None


def draw_times(process: Process, key: Array, shape: tuple[int, ...]) -> Array:
    """Timesteps as the model is told them, float32 of a shape: whole numbers, or 1000 sigma on straight paths.

    Straight paths have the thousand levels shift(1), shift(0.999), ..., shift(0.001).
    """
    density = process.density
    if process.schedule is None:
        share = (density or logit_normal_density)(key, shape)
        index = jnp.minimum(jnp.floor(share * FLOW_TIME), FLOW_TIME - 1)
        return FLOW_TIME * shift_sigmas((index + 1) / FLOW_TIME, process.shift)
    count = process.schedule.timesteps
    times = jnp.minimum(jnp.floor((density or uniform_density)(key, shape) * count), count - 1)
    return times if process.timestep_map is None else process.timestep_map(times)


def level_of(process: Process, times: Array) -> Level:
    """Levels of timesteps of any shape, float32."""
    if process.schedule is None:
        return flow_level(times / FLOW_TIME)
    return level_at(process.schedule, times)


def empty_condition(process: Process, condition: PyTree) -> PyTree:
    """The condition of the empty prompt beside that of some rows, leaves [N, ...].

    Models that are told sizes are told those of the row, with the prompt and without it.

    Args:
      condition: of the rows, leaves [N, ...].

    Raises:
      ValueError: the process has none.
    """
    if process.empty is None:
        raise ValueError("guidance needs the condition of the empty prompt; give the process one")
    rows = len(jax.tree.leaves(condition)[0])
    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape[1:])), process.empty)
    if isinstance(empty, TextCondition) and isinstance(condition, TextCondition):
        return empty._replace(sizes=condition.sizes)
    return empty
