"""Schedules against diffusers and float64 references, grids, conversions, weights, noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_scheduler_fixtures import FILE, TABLE_ENTRIES

from dpo_jax.diffusion.schedule import (
    Schedule,
    add_noise,
    convert_prediction,
    cosine_schedule,
    cosmap_weight,
    denoised,
    flow_level,
    flow_sigmas,
    image_shift,
    implied_noise,
    leading_timesteps,
    level_at,
    linear_schedule,
    linspace_timesteps,
    min_snr_plus_one_weight,
    min_snr_weight,
    offset_noise,
    prediction_target,
    predicts_clean,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
    scaled_linear_schedule,
    shift_sigmas,
    sigma_sqrt_weight,
    snr,
    trailing_timesteps,
    with_zero_terminal_snr,
)

EXPECTED = np.load(FILE)
SCHEDULES = {
    "linear": linear_schedule(),
    "scaled_linear": scaled_linear_schedule(),
    "cosine": cosine_schedule(),
    "zero_snr": with_zero_terminal_snr(scaled_linear_schedule()),
}
PARAMETERISATIONS = [predicts_noise, predicts_clean, predicts_velocity, predicts_flow]
SD = SCHEDULES["scaled_linear"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_those_of_diffusers(name):
    table = SCHEDULES[name].alphas_cumprod
    np.testing.assert_allclose(table[TABLE_ENTRIES], EXPECTED[f"table/{name}"], rtol=2e-5, atol=1e-7)
    assert table.dtype == np.float64 and np.all(np.diff(table) < 0)


def test_known_ends_of_stable_diffusions_table():
    assert SD.alphas_cumprod[0] == pytest.approx(0.99915) and SD.alphas_cumprod[999] == pytest.approx(0.0046601, 1e-5)


def test_zero_terminal_snr_keeps_the_first_entry_and_ends_in_noise():
    zero = SCHEDULES["zero_snr"].alphas_cumprod
    assert zero[-1] == 0 and zero[0] == pytest.approx(SD.alphas_cumprod[0], abs=1e-15)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_grids_are_those_of_diffusers(steps):
    np.testing.assert_array_equal(leading_timesteps(steps, steps_offset=0), EXPECTED[f"grid/leading_{steps}"])
    np.testing.assert_array_equal(trailing_timesteps(steps), EXPECTED[f"grid/trailing_{steps}"])
    if steps > 1:  # of one step the library makes t = 0
        np.testing.assert_array_equal(linspace_timesteps(steps), EXPECTED[f"grid/linspace_{steps}"])


def test_grid_extremes():
    assert leading_timesteps(7)[0] == 853 and leading_timesteps(50)[-1] == 1
    assert list(trailing_timesteps(1000)) == list(range(999, -1, -1)) == list(linspace_timesteps(1000))
    with pytest.raises(ValueError, match="steps_offset 1 moves"):
        leading_timesteps(1000)
    with pytest.raises(ValueError, match="0 sampling steps"):
        trailing_timesteps(0)
    with pytest.raises(ValueError, match="1001 sampling steps"):
        linspace_timesteps(1001)


@pytest.mark.parametrize("table", [[0.5, 0.6], [1.0, 0.5], [0.5, -0.1], [[0.5]]])
def test_a_table_that_is_no_schedule_is_refused(table):
    with pytest.raises(ValueError, match="is no schedule"):
        Schedule(np.array(table))


def test_flow_levels_of_the_library():
    np.testing.assert_allclose(flow_sigmas(7, shift=3.0), EXPECTED["flow/sigmas"], atol=1e-6)
    np.testing.assert_allclose(
        flow_sigmas(5, shift=float(np.exp(0.9)), lowest=1 / 5), EXPECTED["flow_dynamic/sigmas"], atol=1e-6
    )
    assert flow_sigmas(10)[-2] == pytest.approx(0.0089, abs=1e-4)
    assert flow_sigmas(10, lowest=1e-3)[-2] == pytest.approx(0.003, abs=1e-4)


def test_shift_is_undone_by_its_inverse_and_keeps_the_ends():
    s = np.linspace(0, 1, 11)
    np.testing.assert_allclose(shift_sigmas(shift_sigmas(s, 3.0), 1 / 3), s, atol=1e-15)
    assert shift_sigmas(s, 3.0)[0] == 0 and shift_sigmas(s, 3.0)[-1] == 1
    assert image_shift(256) == pytest.approx(np.exp(0.5)) and image_shift(4096) == pytest.approx(np.exp(1.15))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_levels_at_the_extremes_keep_float32_digits(schedule):
    times = jnp.array([0, 1, 998, 999])
    level = jax.jit(lambda t: level_at(schedule, t))(times)
    abar = schedule.alphas_cumprod[np.asarray(times)]
    np.testing.assert_allclose(level.alpha, np.sqrt(abar), rtol=1e-7)
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - abar), rtol=1e-7)


def random_pair(shape=(4, 3, 3, 2), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return [jax.random.normal(key, shape, dtype) for key in keys]


LEVELS = [level_at(SD, jnp.array([0, 1, 500, 999])), flow_level(jnp.array([0.001, 0.3, 0.9, 1.0]))]


@pytest.mark.parametrize("level", LEVELS, ids=["table", "path"])
@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_clean_and_noise_come_back_from_a_perfect_prediction(parameterisation, level):
    clean, noise = random_pair()
    latents = add_noise(clean, noise, level)
    said = denoised(prediction_target(clean, noise, level, parameterisation), latents, level, parameterisation)
    alpha, sigma = (np.asarray(v).reshape(4, 1, 1, 1) for v in level)
    shown = lambda v: np.maximum(v, 1e-3)  # noqa: E731  what a level nearly hides is known to fewer digits
    hidden = parameterisation is predicts_noise and level is LEVELS[1]  # alpha is 0 in the last place
    keep = slice(0, 3) if hidden else slice(None)
    assert np.max(np.abs(said.clean - clean)[keep] * shown(alpha)[keep]) < 2e-6
    assert np.max(np.abs(said.noise - noise) * shown(sigma)) < 2e-6
    assert np.all(np.isfinite(said.clean)) and np.all(np.isfinite(said.noise))


@pytest.mark.parametrize("target", PARAMETERISATIONS)
@pytest.mark.parametrize("source", PARAMETERISATIONS)
def test_conversions_agree_with_the_definitions_in_float64(source, target):
    rng, abar = np.random.default_rng(0), SD.alphas_cumprod[[100, 600]].reshape(2, 1)
    clean, noise = rng.normal(size=(2, 2, 5))
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    wanted = {
        predicts_noise: noise,
        predicts_clean: clean,
        predicts_velocity: a * noise - s * clean,
        predicts_flow: noise - clean,
    }
    level, latents = level_at(SD, jnp.array([100, 600])), jnp.asarray(a * clean + s * noise)
    converted = convert_prediction(jnp.asarray(wanted[source]), latents, level, source=source, target=target)
    np.testing.assert_allclose(converted, wanted[target], rtol=1e-5, atol=2e-6)


def test_what_pure_noise_and_clean_latents_hide_is_zero_with_finite_gradients():
    clean, noise = random_pair()
    at_noise = level_at(SCHEDULES["zero_snr"], jnp.full(4, 999))
    said = denoised(noise, noise, at_noise, predicts_noise)
    assert not said.clean.any() and jnp.array_equal(said.noise, noise)
    at_clean = flow_level(jnp.zeros(4))
    said = denoised(clean, clean, at_clean, predicts_clean)
    assert not said.noise.any() and jnp.array_equal(said.clean, clean)
    velocity = prediction_target(clean, noise, at_noise, predicts_velocity)
    np.testing.assert_allclose(denoised(velocity, noise, at_noise, predicts_velocity).clean, clean, atol=1e-6)
    gradient = jax.grad(lambda p: sum(jnp.sum(v**2) for v in denoised(p, noise, at_noise, predicts_noise)))(noise)
    assert jnp.all(jnp.isfinite(gradient))


def test_velocity_of_unit_variance_data_has_unit_variance():
    clean, noise = random_pair((2, 100_000))
    velocity = prediction_target(clean, noise, level_at(SD, jnp.array([300, 800])), predicts_velocity)
    np.testing.assert_allclose(jnp.mean(velocity**2, 1), 1.0, atol=0.02)


def test_bfloat16_is_computed_in_float32():
    clean, noise = random_pair(dtype=jnp.bfloat16)
    level = level_at(SD, jnp.array([0, 1, 500, 999]))
    latents = add_noise(clean, noise, level)
    assert latents.dtype == jnp.float32
    alpha, sigma = (np.asarray(v, np.float64).reshape(4, 1, 1, 1) for v in level)
    wanted = alpha * np.asarray(clean, np.float64) + sigma * np.asarray(noise, np.float64)
    np.testing.assert_allclose(latents, wanted, atol=1e-6)
    assert denoised(noise, clean, level, predicts_velocity).noise.dtype == jnp.float32
    assert offset_noise(jax.random.key(0), noise).dtype == jnp.float32


def test_min_snr_weights():
    level = level_at(SD, jnp.array([0, 100, 400, 700, 999]))
    ratio = np.asarray(snr(level), np.float64)
    clipped = np.minimum(ratio, 5.0)
    np.testing.assert_allclose(min_snr_weight(level, predicts_noise), clipped / ratio, rtol=1e-5)
    np.testing.assert_allclose(min_snr_weight(level, predicts_velocity), clipped / (ratio + 1), rtol=1e-5)
    np.testing.assert_allclose(min_snr_weight(level, predicts_clean), clipped, rtol=1e-5)
    path = flow_level(jnp.array([0.2, 0.7]))
    wanted = np.minimum((0.8 / 0.2) ** 2, 5) * 0.2**2, np.minimum((0.3 / 0.7) ** 2, 5) * 0.7**2
    np.testing.assert_allclose(min_snr_weight(path, predicts_flow), wanted, rtol=1e-5)
    noise_weight = min_snr_weight(level, predicts_noise)
    assert jnp.all(noise_weight <= 1) and jnp.all(jnp.where(snr(level) <= 5, noise_weight == 1, True))


def test_min_snr_weights_with_one_added_keep_the_last_level():
    level = level_at(with_zero_terminal_snr(SD), jnp.array([0, 100, 400, 700, 999]))
    ratio = np.asarray(snr(level), np.float64) + 1
    np.testing.assert_allclose(min_snr_plus_one_weight(level), np.minimum(ratio, 5.0) / ratio, rtol=1e-4)
    assert float(min_snr_plus_one_weight(level)[-1]) == 1 and min_snr_weight(level, predicts_velocity)[-1] < 1e-20
    with pytest.raises(ValueError, match="gamma"):
        min_snr_plus_one_weight(level, gamma=0.0)


def test_weights_of_straight_paths():
    sigmas = np.linspace(0, 1, 10_001)
    weights = np.asarray(cosmap_weight(jnp.asarray(sigmas)), np.float64)
    assert np.mean((weights[1:] + weights[:-1]) / 2) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(weights, weights[::-1], rtol=1e-5)
    np.testing.assert_allclose(weights[[0, 5000]], [2 / np.pi, 4 / np.pi], rtol=1e-6)
    # The cosine schedule's levels sin / (sin + cos) of uniform angles: equal weight up to each of them.
    angles = np.array([0.1, 0.25, 0.4, 0.8])
    reached = np.tan(np.pi / 2 * angles) / (1 + np.tan(np.pi / 2 * angles))
    inside = [np.mean(np.where(sigmas <= level, weights, 0)) for level in reached]
    np.testing.assert_allclose(inside, angles, atol=2e-4)
    np.testing.assert_allclose(sigma_sqrt_weight(jnp.array([0.5, 0.1, 1.0])), [4, 100, 1], rtol=1e-5)


@pytest.mark.parametrize("parameterisation", PARAMETERISATIONS)
def test_min_snr_weights_are_finite_at_pure_noise_and_at_clean_latents(parameterisation):
    weight = min_snr_weight(flow_level(jnp.array([0.0, 1.0])), parameterisation)
    limits = {predicts_noise: (0, 1), predicts_clean: (5, 0), predicts_velocity: (0, 0), predicts_flow: (0, 0)}
    np.testing.assert_allclose(weight, limits[parameterisation], atol=1e-6)


def test_min_snr_weights_of_noise_and_clean_errors_name_the_same_loss():
    clean, noise = random_pair()
    level = level_at(SD, jnp.array([5, 100, 500, 900]))
    latents, wrong = add_noise(clean, noise, level), noise + 0.1 * clean
    errors = []
    for kind in PARAMETERISATIONS:
        said = convert_prediction(wrong, latents, level, source=predicts_noise, target=kind)
        square = jnp.sum((said - prediction_target(clean, noise, level, kind)) ** 2, (1, 2, 3))
        errors.append(min_snr_weight(level, kind) * square)
    np.testing.assert_allclose(errors, np.broadcast_to(errors[0], (4, 4)), rtol=1e-3)


def test_offset_noise_shifts_whole_channels():
    noise = jnp.zeros((3, 4, 4, 2))
    shifted = offset_noise(jax.random.key(1), noise, strength=0.1)
    np.testing.assert_array_equal(shifted, jnp.broadcast_to(shifted[:, :1, :1], noise.shape))
    assert len(np.unique(shifted)) == 6
    many = offset_noise(jax.random.key(1), jnp.zeros((20_000, 1, 2)), strength=0.1)
    assert float(jnp.std(many)) == pytest.approx(0.1, rel=0.02)


def test_implied_noise_is_the_noise_that_was_added():
    clean, noise = random_pair()
    level = level_at(SD, jnp.array([1, 200, 500, 999]))
    np.testing.assert_allclose(implied_noise(add_noise(clean, noise, level), clean, level), noise, atol=1e-4)
    assert not implied_noise(clean, clean, flow_level(jnp.zeros(4))).any()


def test_one_level_per_example_under_jit_vmap_and_grad():
    clean, noise = random_pair()
    times = jnp.array([0, 7, 500, 999])
    noised = lambda c, n, t: add_noise(c, n, level_at(SD, t))  # noqa: E731
    together = jax.jit(noised)(clean, noise, times)
    alone = [noised(clean[i : i + 1], noise[i : i + 1], times[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(together, jnp.stack(alone), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(noised)(clean, noise, times), together, atol=1e-6)
    gradient = jax.grad(lambda c: jnp.sum(noised(c, noise, times)))(clean)
    np.testing.assert_allclose(gradient[:, 0, 0, 0], np.sqrt(SD.alphas_cumprod[np.asarray(times)]), rtol=1e-6)
    with pytest.raises(ValueError, match="one per example"):
        noised(clean, noise, times[:3])
