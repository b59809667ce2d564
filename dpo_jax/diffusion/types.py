"""The data types of the diffusion wing: a model, a noise level, one step of a sampler, what a rollout returns.

Latents are [B, ...] with the channels last; any number of axes may stand between (height and width, frames).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from dpo_jax.types import Array, PyTree

# A table made on the host or an array on the device.
Table = np.ndarray | Array
# predict(latents [B, ...], timesteps [B], condition) -> [B, ...]; leaves of the condition are [B, ...] too.
# Timesteps are float32, whole numbers unless the sampler's grid is fractional; a flow model is given 1000 sigma.
Predict = Callable[[Array, Array, PyTree], Array]
# What the images of a row are, by the form of the row: `policy_chosen_error` is image 0 of a pair. The items of a list
# have no names.
IMAGES: Mapping[str, tuple[str, ...]] = {
    "pairs": ("chosen", "rejected"),
    "singles": ("image",),
    "mismatched": ("image", "mismatched"),
    "experts": ("expert", "sampled"),
    "patches": ("entity", "generated"),
    "lists": (),
}
# What a model predicts: (alpha, sigma) -> (a, b) such that the prediction is a * noise + b * clean.
Parameterisation = Callable[[Table, Table], tuple[Table | float, Table | float]]


class TextCondition(NamedTuple):
    """What a text-to-image model is told; every leaf leads with B.

    Attributes:
      states: [B, L, D] of the text encoders.
      pooled: [B, P], one vector of the whole text, for models that want it.
      sizes: [B, 6], original height and width, top and left of the crop, target height and width (SDXL).
      mask: bool [B, L], which states may be seen; all by default.
    """

    states: Table
    pooled: Table | None = None
    sizes: Table | None = None
    mask: Table | None = None


class Level(NamedTuple):
    """How noisy latents are: x = alpha * clean + sigma * noise.

    Attributes:
      alpha, sigma: float32 [] or [B]; tables of a sampler are [S] or [S, B].
    """

    alpha: Table
    sigma: Table


class Denoised(NamedTuple):
    """What a prediction says about the latents; both float32 [B, ...]."""

    clean: Array
    noise: Array


class Step(NamedTuple):
    """Steps of a sampler, all of them linear in what the model says: next = clean * x0 + noise * eps + std * z.

    Each field is float32 [S], or [S, B] for a grid of each example's own; a single step is [] or [B]. Slices of a
    table are tables (`take_steps`), so a rollout may be cut into parts.

    Attributes:
      time: what the model is given as its timestep.
      alpha, sigma: the level at which the model is called.
      clean, noise: weights of the predicted clean latents and of the predicted noise.
      std: standard deviation of the noise that is added, or None for a deterministic sampler.
      history: weight of the change of the predicted clean latents since the step before, or None (one-step methods).
    """

    time: Table
    alpha: Table
    sigma: Table
    clean: Table
    noise: Table
    std: Table | None = None
    history: Table | None = None

    @property
    def level(self) -> Level:
        """The level at which the model is called."""
        return Level(self.alpha, self.sigma)


class Transition(NamedTuple):
    """A Gaussian step: mean float32 [B, ...] and standard deviation float32 [] or [B], the same for all elements."""

    mean: Array
    std: Array


class Trajectory(NamedTuple):
    """The recorded part of a rollout, constants.

    Attributes:
      latents: float32 [B, S + 1, ...], the state before each recorded step and after the last of them.
      logps: float32 [B, S], log-probability of each recorded step, summed over elements; zero for deterministic steps.
    """

    latents: Array
    logps: Array


class Sample(NamedTuple):
    """What a rollout returns: final latents float32 [B, ...] and the trajectory if one was asked for."""

    latents: Array
    trajectory: Trajectory | None = None


@dataclass(frozen=True)
class DiffusionBatch:
    """Rows of K images, each with its condition; NumPy on the host, jax arrays on devices.

    Attributes:
      latents: [B, K, ...], clean, in the order of IMAGES, channels last; any float dtype.
      condition: pytree whose leaves are [B, K, ...], or [B, 1, ...] where the images of a row share one.
      weight: float32 [B], 0 for empty places.
      columns: name -> [B, ...].
      spread: standard deviation of the autoencoder's posterior, like `latents`, which are then its mean and are drawn
        anew each time; None for latents without one.
      seeds: uint32 [B]; timesteps and noise of a row are drawn from its own seed, and so do not depend on the rows or
        the microbatch that it is computed with. None: they are drawn from the objective's key.
    """

    latents: Array | np.ndarray
    condition: PyTree
    weight: Array | np.ndarray
    columns: Mapping[str, Array | np.ndarray]
    spread: Array | np.ndarray | None = None
    seeds: Array | np.ndarray | None = None


jax.tree_util.register_dataclass(
    DiffusionBatch, data_fields=["latents", "condition", "weight", "columns", "spread", "seeds"], meta_fields=[]
)


@dataclass(frozen=True)
class TrajectoryBatch:
    """Recorded parts of rollouts, K of them in a row.

    Attributes:
      latents: float32 [B, K, S + 1, ...], the state before each step and after the last.
      steps: fields [B, S], the steps that were recorded.
      condition: as in `DiffusionBatch`; a `Guidance` of two for guided rollouts.
      weight, columns: as in `DiffusionBatch`.
    """

    latents: Array | np.ndarray
    steps: Step
    condition: PyTree
    weight: Array | np.ndarray
    columns: Mapping[str, Array | np.ndarray]


jax.tree_util.register_dataclass(
    TrajectoryBatch, data_fields=["latents", "steps", "condition", "weight", "columns"], meta_fields=[]
)
