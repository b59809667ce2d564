"""ReNoise: regularisers against float64 NumPy, accelerated fixed points, the noise that corrects a stochastic step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import gaussian_model

from dpo_jax.diffusion.inversion import averaged, fixed_point, invert
from dpo_jax.diffusion.methods.renoise import (
    accelerated_step,
    autocorrelation,
    correcting_noise,
    edit_prediction,
    patch_divergence,
    renoise_inversion,
    replay,
)
from dpo_jax.diffusion.sampler import dpm_solver_steps, sample
from dpo_jax.diffusion.schedule import leading_timesteps, predicts_noise, scaled_linear_schedule
from dpo_jax.diffusion.transitions import ddim_steps, draw, take_steps
from dpo_jax.diffusion.types import Transition

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SD = scaled_linear_schedule()
KEY = jax.random.key(0)


def noises(shape=(2, 8, 12, 3)):
    return np.random.default_rng(0).normal(size=(2, *shape))


def numpy_divergence(e, target, patch=4, floor=1e-6):
    total = np.zeros(len(e))
    for b, i, j, c in np.ndindex(len(e), e.shape[1] // patch, e.shape[2] // patch, e.shape[3]):
        here = (b, slice(patch * i, patch * i + patch), slice(patch * j, patch * j + patch), c)
        m, v, n, w = e[here].mean(), e[here].var(ddof=1), target[here].mean(), target[here].var(ddof=1)
        total[b] += abs(np.log((w + floor) / (v + floor)) + (v + (m - n) ** 2) / (w + floor) - 1)
    return total


def test_divergence_of_patches_is_that_of_float64():
    e, target = noises()
    given = patch_divergence(jnp.asarray(e, jnp.float32), jnp.asarray(target, jnp.float32))
    np.testing.assert_allclose(given, numpy_divergence(e, target), rtol=1e-4)
    np.testing.assert_allclose(patch_divergence(jnp.asarray(e), jnp.asarray(e)), 0, atol=1e-3)
    with pytest.raises(ValueError, match="patches of 5"):
        patch_divergence(jnp.asarray(e), jnp.asarray(target), patch=5)
    slope = jax.grad(lambda t: patch_divergence(jnp.asarray(e), t).sum())(jnp.asarray(target))
    assert np.all(slope == 0)


def test_gradient_of_the_divergence():
    """Central differences of the float64 formula."""
    e, target = noises((1, 4, 4, 1))
    given = jax.grad(lambda x: patch_divergence(x, jnp.asarray(target, jnp.float32)).sum())(jnp.asarray(e, jnp.float32))
    for place in ((0, 0, 0, 0), (0, 2, 3, 0), (0, 3, 1, 0)):
        step = np.zeros_like(e)
        step[place] = 1e-5
        wanted = (numpy_divergence(e + step, target) - numpy_divergence(e - step, target)) / 2e-5
        np.testing.assert_allclose(given[place], wanted[0], rtol=1e-3, atol=1e-4)


def numpy_autocorrelation(noise, key, smallest=8):
    total = np.zeros(len(noise))
    while True:
        key, shift_key = jax.random.split(key)
        side = noise.shape[1]
        shift = int(jax.random.randint(shift_key, (), 0, max(side // 2, 1)))
        for axis in (1, 2):
            total += ((noise * np.roll(noise, shift, axis)).mean((1, 2)) ** 2).sum(-1)
        if side <= smallest:
            return total
        noise = noise.reshape(len(noise), side // 2, 2, side // 2, 2, -1).mean((2, 4))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_autocorrelation_is_that_of_float64(seed):
    noise, _ = noises((2, 16, 16, 3))
    given = autocorrelation(jnp.asarray(noise, jnp.float32), jax.random.key(seed))
    np.testing.assert_allclose(given, numpy_autocorrelation(noise, jax.random.key(seed)), rtol=1e-3, atol=1e-6)


def test_white_noise_has_little_autocorrelation_and_smooth_noise_much():
    white = jax.random.normal(KEY, (1, 32, 32, 4))
    smooth = jnp.repeat(jnp.repeat(white[:, :4, :4], 8, 1), 8, 2)

    def mean(noise):
        return float(np.mean([autocorrelation(noise, jax.random.key(seed))[0] for seed in range(4)]))

    assert mean(smooth) > 1.5 * mean(white)


def test_an_edit_lowers_its_regulariser_and_its_slope_is_cut_off():
    e, target = (jnp.asarray(x, jnp.float32) for x in noises())
    regulariser = partial(lambda target, x: patch_divergence(x, target), target)
    edited = edit_prediction(2 * e, regulariser, rate=0.01)
    assert np.all(np.asarray(regulariser(edited)) < np.asarray(regulariser(2 * e)))
    cut = edit_prediction(e, lambda x: 1e6 * x.sum(axis=(1, 2, 3)), rate=0.01)
    np.testing.assert_allclose(e - cut, 1.0, rtol=1e-5)


TEN = ddim_steps(SD, leading_timesteps(10))
STEP = take_steps(TEN, 4)  # 501 from 401


def linear(seed=0, size=6, strength=0.9):
    matrix = np.random.default_rng(seed).normal(size=(size, size))
    matrix = strength * matrix / np.linalg.norm(matrix, 2)

    def model(latents, times, condition):
        return latents @ jnp.asarray(matrix.T, jnp.float32)

    here, after = SD.alphas_cumprod[401], SD.alphas_cumprod[501]
    gain = np.sqrt(1 - after) - np.sqrt(after * (1 - here) / here)
    return model, lambda z: np.linalg.solve(np.eye(size) - gain * matrix, np.sqrt(after / here) * z.T).T


def test_accelerated_iteration_reaches_the_fixed_point_of_linear_algebra():
    model, exact = linear()
    z = np.random.default_rng(1).normal(size=(5, 6))
    errors = []
    for calls in (1, 2, 4, 8):
        step = jit(partial(accelerated_step, model, step=STEP, parameterisation=predicts_noise, calls=calls))
        errors.append(np.abs(step(jnp.asarray(z, jnp.float32)) - exact(z)).max())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5, errors
    plain = ddim_steps(SD, np.array([501]), last_alpha_cumprod=SD.alphas_cumprod[401])
    for calls in (1, 4):
        iterated = invert(
            model, jnp.asarray(z, jnp.float32), plain, parameterisation=predicts_noise, weights=fixed_point(calls)
        )
        error = np.abs(iterated.latents - exact(z)).max()
        index = (1, 2, 4, 8).index(calls)
        assert error == pytest.approx(errors[index], rel=1e-3) if calls == 1 else errors[index] <= error


def test_examples_are_accelerated_one_by_one_and_a_constant_model_is_exact_at_once():
    model, _ = linear()
    z = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6)), jnp.float32)
    step = jit(partial(accelerated_step, model, step=STEP, parameterisation=predicts_noise))
    np.testing.assert_allclose(step(z)[:2], step(z[:2]), atol=1e-6)
    still = [
        accelerated_step(lambda x, t, c: jnp.ones_like(x), z, STEP, parameterisation=predicts_noise, calls=calls)
        for calls in (1, 4)
    ]
    np.testing.assert_allclose(still[1], still[0], atol=1e-6)  # no division of zero by zero
    with pytest.raises(ValueError, match="calls"):
        accelerated_step(model, z, STEP, parameterisation=predicts_noise, calls=0)


def test_corrected_noise_lands_on_the_value():
    mean, value = jax.random.normal(KEY, (2, 4, 3))
    std = jnp.array([0.5, 0.1, 2.0, 0.0])
    noise = correcting_noise(Transition(mean, std), value)
    np.testing.assert_allclose((mean + std[:, None] * noise)[:3], value[:3], atol=1e-5)
    np.testing.assert_array_equal(noise[3], 0)
    drawn = draw(Transition(mean, std), KEY)
    np.testing.assert_allclose(
        correcting_noise(Transition(mean, std), drawn)[:3], jax.random.normal(KEY, (4, 3))[:3], atol=1e-4
    )


# The loop

EXACT = gaussian_model(SD, predicts_noise)


def smooth_images():
    """The exact model of independent pixels keeps patterns: the plain inversion of smooth images is smooth."""
    coarse = 0.6 + 0.4 * jax.random.normal(KEY, (2, 4, 4, 4))
    return jnp.repeat(jnp.repeat(coarse, 4, 1), 4, 2)


def mean_autocorrelation(noise):
    return float(np.mean([autocorrelation(noise, jax.random.key(seed)).mean() for seed in range(8)]))


def test_edits_make_the_inverted_latents_more_like_noise_and_the_corrected_noise_leads_back():
    steps, images = ddim_steps(SD, leading_timesteps(10), eta=0.3), smooth_images()
    white, other = jax.random.normal(jax.random.key(1), (2, *images.shape))

    def run(images, **rates):
        found = renoise_inversion(EXACT, images, steps, key=jax.random.key(2), **rates)
        return found.latents, replay(EXACT, found.latents, steps, found.noises)

    def unlike(latents):
        """Correlation and divergence of latents of deviation 1 above those of noise: smaller is not yet whiter."""
        latents = latents / latents.std()
        divergence = patch_divergence(latents, white) - patch_divergence(other, white)
        return np.array([mean_autocorrelation(latents) - mean_autocorrelation(other), float(divergence.mean())])

    plain, plain_end = jit(partial(run, divergence_rate=0.0, correlation_rate=0.0))(images)
    # The recipe's 20 is for 64 x 64: a mean over fewer pixels has larger slopes.
    edited, edited_end = jit(partial(run, correlation_rate=20 * (16 / 64) ** 2))(images)
    assert np.all(unlike(edited) < 0.7 * unlike(plain)) and np.all(unlike(plain) > 0)
    assert abs(edited.std() - 1) < abs(plain.std() - 1)
    for end in (plain_end, edited_end):
        np.testing.assert_allclose(end, images, atol=1e-5)


def test_a_last_step_without_noise_is_not_edited():
    steps, images = ddim_steps(SD, leading_timesteps(10), eta=0.3, last_alpha_cumprod=1.0), smooth_images()
    assert steps.std[-1] == 0 and (np.asarray(steps.std[:-1]) > 0).all()

    def error(**rates):
        found = renoise_inversion(EXACT, images, steps, key=jax.random.key(2), **rates)
        return jnp.abs(replay(EXACT, found.latents, steps, found.noises) - images).max()

    edited = jit(partial(error, correlation_rate=20 * (16 / 64) ** 2))()
    assert edited < 1e-3, edited


def test_without_edits_it_is_the_inversion_of_a_deterministic_table():
    steps, images = TEN, smooth_images()
    weights = np.where(np.asarray(steps.time)[:, None] < 250, averaged(0, 2, 4), averaged(3, 4))
    wanted = invert(EXACT, images, steps, parameterisation=predicts_noise, weights=weights).latents
    given = jit(
        lambda x: renoise_inversion(
            EXACT, x, steps, key=KEY, weights=weights, divergence_rate=0.0, correlation_rate=0.0
        )
    )(images)
    np.testing.assert_allclose(given.latents, wanted, atol=1e-5)
    assert given.noises is None
    end = sample(EXACT, wanted, steps, parameterisation=predicts_noise).latents
    np.testing.assert_allclose(replay(EXACT, wanted, steps), end, atol=1e-5)


def test_the_loop_refuses_what_it_cannot_undo():
    with pytest.raises(ValueError, match="one-step"):
        renoise_inversion(EXACT, smooth_images(), dpm_solver_steps(SD, leading_timesteps(10)), key=KEY)
    with pytest.raises(ValueError, match="correlation_rate"):
        renoise_inversion(EXACT, smooth_images(), TEN, key=KEY, correlation_rate=-1.0)
