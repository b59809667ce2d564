"""Two modes per class in the plane: the smallest diffusion problem with a preference, and everything about it exact.

The six modes of three classes stand evenly on a circle, each a round normal cloud; every class has a preferred mode
and, next to it, another one. A point that is scaled and noised, x_t = scale x_0 + noise eps, is again a normal mixture,
so the score, the best prediction of the noise and of the clean point, and every likelihood are known at every noise
level. Diffusion models have scale = sqrt(abar), noise = sqrt(1 - abar); flows scale = 1 - t, noise = t.

For orientation, one seed of a network of two hidden layers of 128, 2500 steps of batch 256 and 20 DDIM steps:
preferred 0.48, on the manifold 0.93; after 300 steps of Diffusion-DPO on clean pairs (Adam 3e-4) 0.75 and 0.94 with
beta 500, 0.99 and 0.91 with beta 100, and 1.00 but nothing on the manifold with beta 20. These are the runs of
tests/diffusion/methods/test_learning_on_two_modes.py, which holds their bounds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

EDGE = 3.0  # deviations from a mode up to which a point lies on it; 0.98889 of the mode's own points do
PREFERRED, OTHER = 0, 1


@dataclass(frozen=True)
class TwoModes:
    """The distribution.

    Attributes:
      classes: their number C.
      radius: of the circle of modes; by default the modes are so far apart that no point lies on two of them.
      deviation: of a mode, in each of the two directions.
      preferred_share: of a class's points, from its preferred mode.
    """

    classes: int = 3
    radius: float = 2.0
    deviation: float = 0.3
    preferred_share: float = 0.5


WORLD = TwoModes()


class Points(NamedTuple):
    """Points float32 [N, 2], their classes and modes int32 [N] (PREFERRED or OTHER)."""

    points: np.ndarray
    classes: np.ndarray
    modes: np.ndarray


class Pairs(NamedTuple):
    """Pairs of points of one class.

    Attributes:
      chosen, rejected: float32 [N, 2].
      classes: int32 [N].
      chosen_reward, rejected_reward: float32 [N], the true rewards; a wrong label has the lower one at chosen.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    classes: np.ndarray
    chosen_reward: np.ndarray
    rejected_reward: np.ndarray


class Measures(NamedTuple):
    """Exact measures of samples; each is a share of all of them but `preferred_on_manifold`.

    Attributes:
      preferred: nearer to the preferred mode of their class than to its other one.
      on_manifold: within EDGE deviations of a mode of their class.
      on_preferred, on_other: within EDGE deviations of that mode.
      preferred_on_manifold: `on_preferred` divided by `on_manifold` (0 if none is there).
      right_class: nearer to a mode of their class than to any other.
    """

    preferred: float
    on_manifold: float
    on_preferred: float
    on_other: float
    preferred_on_manifold: float
    right_class: float


def mode_centres(world: TwoModes = WORLD) -> np.ndarray:
    """Centres float32 [C, 2, 2]: of each class the preferred mode, then the other."""
    angles = np.arange(2 * world.classes) * np.pi / world.classes
    around = world.radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return around.reshape(world.classes, 2, 2).astype(np.float32)


def make_points(count: int, seed: int, *, random_classes: float = 0.0, world: TwoModes = WORLD) -> Points:
    """Data to train a base model on; a share `random_classes` is told a class drawn at random."""
    random = np.random.default_rng(seed)
    classes = random.integers(world.classes, size=count)
    modes = np.where(random.random(count) < world.preferred_share, PREFERRED, OTHER)
    points = _draw(random, classes, modes, world.deviation, world)
    wrong = random.random(count) < random_classes
    told = np.where(wrong, random.integers(world.classes, size=count), classes)
    return Points(points, told.astype(np.int32), modes.astype(np.int32))


def make_pairs(count: int, seed: int, *, world: TwoModes = WORLD) -> Pairs:
    """Clean labels: chosen from the preferred mode, rejected from the other."""
    random = np.random.default_rng(seed)
    classes = random.integers(world.classes, size=count)
    chosen = _draw(random, classes, np.full(count, PREFERRED), world.deviation, world)
    rejected = _draw(random, classes, np.full(count, OTHER), world.deviation, world)
    return _pairs(chosen, rejected, classes, world)


def make_noisy_pairs(
    count: int, seed: int, *, same_mode: float = 0.2, gap: float = 2.0, world: TwoModes = WORLD
) -> Pairs:
    """Labels drawn from the Bradley-Terry model of the true rewards, which differ by `gap` between the modes.

    A share `same_mode` has both points in one mode and is labelled at random. With the defaults 0.3 of the labels are
    wrong or between equals: 0.2 + 0.8 sigmoid(-2).
    """
    random = np.random.default_rng(seed)
    classes = random.integers(world.classes, size=count)
    first = random.integers(2, size=count)
    second = np.where(random.random(count) < same_mode, first, 1 - first)
    one, two = (_draw(random, classes, modes, world.deviation, world) for modes in (first, second))
    margin = reward(one, classes, gap=gap, world=world) - reward(two, classes, gap=gap, world=world)
    wins = (random.random(count) < 1 / (1 + np.exp(-margin)))[:, None]
    return _pairs(np.where(wins, one, two), np.where(wins, two, one), classes, world, gap)


def make_worse_pairs(
    count: int, seed: int, *, chosen_spread: float = 2.0, rejected_spread: float = 4.0, world: TwoModes = WORLD
) -> Pairs:
    """Pairs that are both worse than the data: in one mode, spread 2 and 4 times as wide, the less spread one chosen.

    The rewards are minus half the squared distances to the mode, in deviations.
    """
    random = np.random.default_rng(seed)
    classes, modes = random.integers(world.classes, size=count), random.integers(2, size=count)
    chosen, rejected = (
        _draw(random, classes, modes, spread * world.deviation, world) for spread in (chosen_spread, rejected_spread)
    )
    centres = mode_centres(world)[classes, modes]
    rewards = [-0.5 * np.square((x - centres) / world.deviation).sum(-1) for x in (chosen, rejected)]
    return Pairs(chosen, rejected, classes.astype(np.int32), *(r.astype(np.float32) for r in rewards))


def reward(points: np.ndarray, classes: np.ndarray, *, gap: float = 2.0, world: TwoModes = WORLD) -> np.ndarray:
    """True reward float32 [N]: `gap` times the probability that the point came from its class's preferred mode."""
    squares = _squares(points, classes, world)
    odds = (squares[:, OTHER] - squares[:, PREFERRED]) / (2 * world.deviation**2)
    return (gap * 0.5 * (1 + np.tanh(odds / 2))).astype(np.float32)


def measure(points: np.ndarray, classes: np.ndarray, *, world: TwoModes = WORLD) -> Measures:
    """Exact measures of samples [N, 2] for their classes [N]; points that are not finite count as nowhere.

    Raises:
      ValueError: points and classes of other forms, or none.
    """
    points, classes = np.asarray(points, np.float64), np.asarray(classes)
    if points.ndim != 2 or points.shape[1] != 2 or classes.shape != points.shape[:1] or not len(points):
        raise ValueError(f"points {list(points.shape)} and classes {list(classes.shape)}; expected [N, 2] and [N]")
    points = np.where(np.isfinite(points).all(axis=1, keepdims=True), points, np.inf)
    squares = _squares(points, classes, world)
    near = squares <= (EDGE * world.deviation) ** 2
    everywhere = np.square(points[:, None] - mode_centres(world).reshape(-1, 2)).sum(-1)
    finite = np.isfinite(points).all(axis=1)
    right = (everywhere.argmin(-1) // 2 == classes) & finite
    manifold = near.any(axis=1).mean()
    return Measures(
        preferred=float((squares[:, PREFERRED] < squares[:, OTHER]).mean()),
        on_manifold=float(manifold),
        on_preferred=float(near[:, PREFERRED].mean()),
        on_other=float(near[:, OTHER].mean()),
        preferred_on_manifold=float(near[:, PREFERRED].mean() / manifold) if manifold else 0.0,
        right_class=float(right.mean()),
    )


def _draw(random: np.random.Generator, classes: np.ndarray, modes: np.ndarray, deviation: float, world: TwoModes):
    centres = mode_centres(world)[classes, modes]
    return (centres + deviation * random.normal(size=(len(classes), 2))).astype(np.float32)


def _pairs(chosen: np.ndarray, rejected: np.ndarray, classes: np.ndarray, world: TwoModes, gap: float = 2.0) -> Pairs:
    rewards = (reward(points, classes, gap=gap, world=world) for points in (chosen, rejected))
    return Pairs(chosen, rejected, classes.astype(np.int32), *rewards)


def _squares(points: np.ndarray, classes: np.ndarray, world: TwoModes) -> np.ndarray:
    """Squared distances [N, 2] to the two modes of the class."""
    return np.square(points[:, None] - mode_centres(world)[classes]).sum(-1)


def log_density(
    x: Array, scale: Array | float, noise: Array | float, classes: Array | None = None, *, world: TwoModes = WORLD
) -> Array:
    """Exact log density [...] of noised points.

    Args:
      x: [..., 2].
      scale, noise: numbers or [...], of x = scale x_0 + noise eps.
      classes: integers [...]; None is the mixture of all classes, the model without a condition.
      world: the distribution of x_0.
    """
    logits, _, variance = _parts(x, scale, noise, classes, world)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.log(2 * jnp.pi * variance)


def denoised(
    x: Array, scale: Array | float, noise: Array | float, classes: Array | None = None, *, world: TwoModes = WORLD
) -> Array:
    """The mean of the clean point given the noised one, [..., 2]; arguments as in `log_density`."""
    logits, centres, variance = _parts(x, scale, noise, classes, world)
    scale = jnp.broadcast_to(jnp.asarray(scale, x.dtype), x.shape[:-1])[..., None, None]
    shrink = scale * world.deviation**2 / variance[..., None, None]
    means = centres + shrink * (x[..., None, :] - scale * centres)
    return (jax.nn.softmax(logits, axis=-1)[..., None] * means).sum(-2)


def score(
    x: Array, scale: Array | float, noise: Array | float, classes: Array | None = None, *, world: TwoModes = WORLD
) -> Array:
    """The gradient of the log density, [..., 2]; finite at noise 0. Arguments as in `log_density`."""
    logits, centres, variance = _parts(x, scale, noise, classes, world)
    scale = jnp.broadcast_to(jnp.asarray(scale, x.dtype), x.shape[:-1])[..., None, None]
    pulls = (scale * centres - x[..., None, :]) / variance[..., None, None]
    return (jax.nn.softmax(logits, axis=-1)[..., None] * pulls).sum(-2)


def epsilon(
    x: Array, scale: Array | float, noise: Array | float, classes: Array | None = None, *, world: TwoModes = WORLD
) -> Array:
    """The mean of the noise given the noised point, [..., 2]: what a perfect model predicts, - noise * score."""
    noise_of_points = jnp.broadcast_to(jnp.asarray(noise, x.dtype), x.shape[:-1])[..., None]
    return -noise_of_points * score(x, scale, noise, classes, world=world)


def _parts(
    x: Array, scale: Array | float, noise: Array | float, classes: Array | None, world: TwoModes
) -> tuple[Array, Array, Array]:
    """Log weights [..., M] of the modes without their common factor, centres [..., M, 2], and their variance [...]."""
    centres = jnp.asarray(mode_centres(world), x.dtype)
    centres = centres.reshape(-1, 2) if classes is None else centres[classes]
    share = jnp.array([world.preferred_share, 1 - world.preferred_share], x.dtype)
    weights = jnp.tile(share, world.classes) / world.classes if classes is None else share
    scale, noise = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape[:-1]) for a in (scale, noise))
    variance = jnp.square(scale * world.deviation) + jnp.square(noise)
    squares = jnp.square(x[..., None, :] - scale[..., None, None] * centres).sum(-1)  # [..., M]
    return jnp.log(weights) - 0.5 * squares / variance[..., None], centres, variance
