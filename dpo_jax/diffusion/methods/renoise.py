"""ReNoise: inversion that asks the model again where it has arrived, averages its answers and keeps them like noise.

Garibi et al. 2024, "ReNoise: Real Image Inversion Through Iterative Noising", arXiv 2403.14602 (ECCV 2024).
Pan et al. 2023, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", arXiv 2309.04907 (AIDI).
Evidence: iteration, averages and regularisers from the official code; AIDI's acceleration is reconstructed.

The iteration and its averages are `inversion.invert` with weights. Here is what acts on one prediction or step, and
the loop of all of it:

    patch_divergence     sum over patches of | log(v* / v) + (v + (m - m*)^2) / v* - 1 |, moments of 4 x 4 patches
    autocorrelation      mean(n roll(n, r))^2 along rows and columns, on halved images until a side is at most 8
    edit_prediction      e <- e - rate clip(gradient): the two regularisers' step
    accelerated_step     the fixed point of one inverted step by Anderson's mixing of two iterates
    correcting_noise     the noise with which a stochastic step lands where the inversion came from
    renoise_inversion    few stochastic steps undone with edited predictions and corrected noise, as for SDXL-Turbo
    replay               the sampler's steps with the noise that it found

The patches span all channels one by one; the published code's unfolding is the same for latents of 4 channels.

>>> import jax.numpy as jnp
>>> noise = jnp.arange(32.0).reshape(1, 4, 8, 1)
>>> float(patch_divergence(noise, noise)[0])
0.0
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.inversion import averaged, undo_step
from dpo_jax.diffusion.sampler import denoise
from dpo_jax.diffusion.schedule import add_noise, per_example, predicts_noise
from dpo_jax.diffusion.transitions import transition
from dpo_jax.diffusion.types import Parameterisation, Predict, Step, Transition
from dpo_jax.ops import require_between, safe_divide
from dpo_jax.types import Array, PyTree


def patch_divergence(prediction: Array, target: Array, *, patch: int = 4, floor: float = 1e-6) -> Array:
    """Divergence of a prediction's patches from those of noise, each taken for Gaussian, float32 [B].

    Args:
      prediction, target: [B, H, W, C], sides multiples of the patch; the target is a constant.
      patch: side of a patch; moments are of each patch and channel.
      floor: added to variances.
    """
    mean, variance = _moments(prediction, patch)
    target_mean, target_variance = (jax.lax.stop_gradient(x) for x in _moments(target, patch))
    above = (variance + jnp.square(mean - target_mean)) / (target_variance + floor)
    divergence = jnp.log((target_variance + floor) / (variance + floor)) + above - 1
    return jnp.sum(jnp.abs(divergence), axis=(1, 2, 3))


def _moments(image: Array, patch: int) -> tuple[Array, Array]:
    """Means and unbiased variances of patches, [B, H, W, C] -> [B, H / patch, W / patch, C] each."""
    b, h, w, c = image.shape
    if h % patch or w % patch:
        raise ValueError(f"latents of {h} x {w} are no patches of {patch}; give a patch that divides both")
    tiles = image.astype(jnp.float32).reshape(b, h // patch, patch, w // patch, patch, c)
    return jnp.mean(tiles, axis=(2, 4)), jnp.var(tiles, axis=(2, 4), ddof=1)


def autocorrelation(noise: Array, key: Array, *, smallest: int = 8) -> Array:
    """Squared correlations of noise with itself, shifted by a random number of rows and columns, float32 [B].

    Args:
      noise: [B, H, W, C], square.
      key: of one shift below half the side at each level of the pyramid.
      smallest: side at which the pyramid of means of 2 x 2 ends.
    """
    noise, total = noise.astype(jnp.float32), jnp.zeros(noise.shape[0], jnp.float32)
    while True:
        key, shift_key = jax.random.split(key)
        b, side, _, c = noise.shape
        shift = jax.random.randint(shift_key, (), 0, max(side // 2, 1))
        for axis in (1, 2):
            product = jnp.mean(noise * jnp.roll(noise, shift, axis=axis), axis=(1, 2))  # [B, C]
            total = total + jnp.sum(jnp.square(product), axis=-1)
        if side <= smallest:
            return total
        noise = jnp.mean(noise.reshape(b, side // 2, 2, side // 2, 2, c), axis=(2, 4))


def edit_prediction(prediction: Array, regulariser: Callable[[Array], Array], *, rate: float, largest: float = 100.0):
    """The prediction moved down a regulariser's gradient, e - rate clip(dJ / de), float32 [B, ...].

    Args:
      prediction: [B, ...].
      regulariser: [B, ...] -> [B], such as `patch_divergence` with its target filled in (rate 0.065).
      rate: of the step; for `autocorrelation` 20 / rolls, repeated with a key for each roll.
      largest: absolute value at which each entry of the gradient is cut off.
    """
    prediction = prediction.astype(jnp.float32)
    slope = jax.grad(lambda e: jnp.sum(regulariser(e)))(prediction)
    return prediction - rate * jnp.clip(slope, -largest, largest)


def accelerated_step(
    predict: Predict,
    latents: Array,
    step: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    calls: int = 4,
) -> Array:
    """One step of a deterministic sampler undone by Anderson's mixing with a history of one, float32 [B, ...].

    With G(y) = F(z, model(y)), r = G(y) - y of the last two iterates and theta = <r, r - r'> / |r - r'|^2 of each
    example, y <- G(y) - theta (G(y) - G(y')). The fixed point is plain iteration's, and is reached sooner.

    Args:
      latents: z, [B, ...].
      step: of the sampler, fields [] or [B].
      condition, parameterisation: as in `inversion.invert`.
      calls: of the model, at least 1; 1 is plain DDIM inversion.
    """
    if calls < 1:
        raise ValueError(f"{calls} model calls; give at least 1")
    start = latents.astype(jnp.float32)
    times = jnp.broadcast_to(jnp.asarray(step.time, jnp.float32), start.shape[:1])
    axes = tuple(range(1, start.ndim))

    def image(guess: Array) -> Array:
        return undo_step(start, predict(guess, times, condition), step, parameterisation)

    def mix(carry: tuple[Array, Array, Array], _: None):
        guess, last_image, last_residual = carry
        now = image(guess)
        residual = now - guess
        change = residual - last_residual
        theta = safe_divide(jnp.sum(residual * change, axis=axes), jnp.sum(jnp.square(change), axis=axes))
        return (now - per_example(theta, now) * (now - last_image), now, residual), None

    first = image(start)
    if calls == 1:
        return first
    return jax.lax.scan(mix, (first, first, first - start), None, length=calls - 1)[0][0]


def correcting_noise(given: Transition, value: Array) -> Array:
    """The noise with which a stochastic step lands on a value, (value - mean) / std, float32; 0 for a certain step."""
    std = jnp.broadcast_to(per_example(given.std, given.mean), given.mean.shape)
    return safe_divide(value.astype(jnp.float32) - given.mean, std)


class Renoised(NamedTuple):
    """What `renoise_inversion` returns.

    Attributes:
      latents: float32 [B, ...], at the level of the table's first step.
      noises: float32 [S, B, ...] of the steps in the order of the sampler, or None for a deterministic table.
    """

    latents: Array
    noises: Array | None


def renoise_inversion(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    key: Array,
    weights: np.ndarray | None = None,
    divergence_rate: float = 0.065,
    correlation_rate: float = 20.0,
    rounds: int = 4,
    rolls: int = 5,
) -> Renoised:
    """A sampler's steps undone with predictions that are kept like noise; the published recipe of SDXL-Turbo.

    Predictions are edited from the first weighted one on, and their average again. A stochastic step is undone with
    noise that is drawn first; then that noise becomes what leads back exactly, so `replay` returns the latents however
    far the edits went. Steps of such a table that have no noise, as a last one to clean latents, are not edited. On a
    deterministic table edits cost the way back, and with both rates 0 it is `inversion.invert`.
    Large steps with much noise may not contract (see there): latents then grow, and more calls make it worse.

    Args:
      predict: predicts the noise, without guidance in the recipe.
      latents: [B, H, W, C], clean and square, sides multiples of 4 and down to 8 of 2.
      steps: a table without history in the order of the sampler, stochastic or not.
      condition: leaves [B, ...].
      key: of the steps' noise, of the noise that the patches are compared with, and of the shifts.
      weights: of the predictions, [calls] or [S, calls] as in `inversion.invert`; by default the average of the first
        five of ten below timestep 250 and of the last two above.
      divergence_rate, correlation_rate: of the edits by `patch_divergence` and `autocorrelation`; 0 leaves one out.
        The second is for 64 x 64 latents and goes with the number of pixels, as its slope is that of a mean.
      rounds: of both edits.
      rolls: of the second in each round.

    Raises:
      ValueError: a negative rate, or a table with history.
    """
    require_between(0.0, float("inf"), divergence_rate=divergence_rate, correlation_rate=correlation_rate)
    if steps.history is not None:
        raise ValueError("only one-step samplers are inverted; give ddim_steps or ddpm_steps")
    count, start = len(steps.time), latents.astype(jnp.float32)
    if weights is None:
        weights = np.where(np.asarray(steps.time)[:, None] < 250, averaged(0, 5, 10), averaged(8, 10))
    table = np.broadcast_to(weights, (count, weights.shape[-1]))
    noise_key, fixed_key, edit_key = jax.random.split(key, 3)
    noises = None if steps.std is None else jax.random.normal(noise_key, (count, *start.shape))
    fixed = jax.random.normal(fixed_key, start.shape)

    def regular(prediction: Array, target: Array, key: Array) -> Array:
        def roll(e: Array, key: Array) -> tuple[Array, None]:
            slope = partial(autocorrelation, key=key)
            return edit_prediction(e, slope, rate=correlation_rate / rolls, largest=float("inf")), None

        def edit(e: Array, key: Array) -> tuple[Array, None]:
            if divergence_rate:
                e = edit_prediction(e, partial(patch_divergence, target=target), rate=divergence_rate)
            return (jax.lax.scan(roll, e, jax.random.split(key, rolls)) if correlation_rate else (e, None))[0], None

        return jax.lax.scan(edit, prediction, jax.random.split(key, rounds))[0]

    def undo(state: Array, inputs: tuple[Step, Array, Array, Array | None, Array]) -> tuple[Array, Array | None]:
        step, row, edited, noise, step_key = inputs
        times = jnp.broadcast_to(jnp.asarray(step.time, jnp.float32), state.shape[:1])
        target = predict(add_noise(start, fixed, step.level), times, condition)
        landing = state if noise is None or step.std is None else state - per_example(step.std, state) * noise
        last_key, *keys = jax.random.split(step_key, row.shape[0] + 1)

        def refine(carry: tuple[Array, Array], inputs: tuple[Array, Array, Array]):
            (guess, total), (weight, edit, edit_key) = carry, inputs
            said = predict(guess, times, condition).astype(jnp.float32)
            said = jax.lax.cond(edit, regular, lambda e, *_: e, said, target, edit_key)
            return (undo_step(landing, said, step, predicts_noise), total + weight * said), None

        (_, said), _ = jax.lax.scan(refine, (state, jnp.zeros_like(state)), (row, edited, jnp.stack(keys)))
        said = jax.lax.cond(edited[-1], regular, lambda e, *_: e, said, target, last_key)
        before = undo_step(landing, said, step, predicts_noise)
        if noise is None:
            return before, None
        given = transition(step, denoise(predict, before, step, condition, predicts_noise))
        return before, correcting_noise(given, state)

    edited = np.cumsum(table, axis=1) > 0
    if steps.std is not None:
        edited &= (np.asarray(steps.std).reshape(count, -1) > 0).all(axis=1, keepdims=True)
    inputs = (steps, jnp.asarray(table, jnp.float32), jnp.asarray(edited), noises)
    reverse = jax.tree.map(lambda leaf: leaf[::-1], inputs)
    end, found = jax.lax.scan(undo, start, (*reverse, jax.random.split(edit_key, count)))
    return Renoised(end, None if found is None else found[::-1])


def replay(
    predict: Predict, latents: Array, steps: Step, noises: Array | None = None, condition: PyTree = None
) -> Array:
    """A sampler's latents with the noise of each step given, float32 [B, ...].

    Args:
      predict: predicts the noise.
      latents, noises: as in `Renoised`.
      steps, condition: as in `renoise_inversion`.
    """

    def advance(state: Array, inputs: tuple[Step, Array | None]) -> tuple[Array, None]:
        step, noise = inputs
        given = transition(step, denoise(predict, state, step, condition, predicts_noise))
        return given.mean if noise is None else given.mean + per_example(given.std, given.mean) * noise, None

    return jax.lax.scan(advance, latents.astype(jnp.float32), (steps, noises))[0]
