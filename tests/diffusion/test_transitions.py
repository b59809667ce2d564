"""Transitions against diffusers, closed forms in float64, and the samplers they reduce to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import EXPECTED, MEAN, SPREAD, gaussian_flow, gaussian_model
from make_scheduler_fixtures import toy_model

from dpo_jax.diffusion.sampler import denoise, flow_euler_steps, sample
from dpo_jax.diffusion.schedule import (
    cosine_schedule,
    flow_sigmas,
    leading_timesteps,
    linear_schedule,
    linspace_timesteps,
    predicts_clean,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
    scaled_linear_schedule,
    trailing_timesteps,
    with_zero_terminal_snr,
)
from dpo_jax.diffusion.transitions import (
    ddim_steps,
    ddpm_steps,
    draw,
    flow_noise_scales,
    flow_sde_steps,
    forward_variance,
    log_prob,
    posterior_variance,
    take_steps,
    transition,
)
from dpo_jax.diffusion.types import Denoised, Transition

SD, LINEAR = scaled_linear_schedule(), linear_schedule()
LEADING8 = leading_timesteps(8)
CASES = {
    "ddim": (ddim_steps(SD, LEADING8), predicts_noise),
    "ddim_eta": (ddim_steps(SD, LEADING8, eta=0.7), predicts_noise),
    "ddim_clean_end": (ddim_steps(SD, trailing_timesteps(8), eta=1.0, last_alpha_cumprod=1.0), predicts_noise),
    "ddim_velocity": (ddim_steps(SD, LEADING8), predicts_velocity),
    "ddim_sample": (ddim_steps(SD, LEADING8, eta=0.3), predicts_clean),
    "ddim_zero_snr": (
        ddim_steps(with_zero_terminal_snr(SD), trailing_timesteps(5), eta=1.0, last_alpha_cumprod=1.0),
        predicts_velocity,
    ),
    "ddpm_small": (ddpm_steps(LINEAR, linspace_timesteps(6)), predicts_noise),
    "ddpm_large": (ddpm_steps(LINEAR, trailing_timesteps(6), variance=forward_variance), predicts_noise),
    "ddpm_cosine": (ddpm_steps(cosine_schedule(), trailing_timesteps(6)), predicts_noise),
}


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_diffusers(name):
    steps, parameterisation = CASES[name]
    np.testing.assert_array_equal(steps.time, EXPECTED[f"{name}/times"])
    states = EXPECTED[f"{name}/latents"]

    @jax.jit
    def step_means(index, state):
        step = take_steps(steps, index)
        said = denoise(lambda x, t, _: toy_model(jnp, x, t[0]), state, step, None, parameterisation)
        return transition(step, said)

    for index, state in enumerate(states[:-1]):
        given = step_means(index, jnp.asarray(state))
        noise = EXPECTED[f"{name}/noise"][index] if f"{name}/noise" in EXPECTED else 0.0
        scale = max(1.0, np.abs(states[index + 1]).max())
        np.testing.assert_allclose(given.mean + given.std * noise, states[index + 1], rtol=0, atol=1e-5 * scale)


def test_ddim_with_eta_one_has_the_posterior_of_ddpm():
    """Mean and variance of q(x_s | x_t, x0) from Bayes' rule in float64."""
    grid = leading_timesteps(20)
    here = SD.alphas_cumprod[grid]
    after = np.append(here[1:], SD.alphas_cumprod[0])
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 20, 6))
    steps = ddim_steps(SD, grid, eta=1.0)
    given = transition(steps, Denoised(jnp.asarray(clean), jnp.asarray(noise)))  # a step per example
    ratio = (here / after)[:, None]
    state = np.sqrt(here)[:, None] * clean + np.sqrt(1 - here)[:, None] * noise
    precision = ratio / (1 - ratio) + 1 / (1 - after[:, None])
    mean = (np.sqrt(ratio) * state / (1 - ratio) + np.sqrt(after)[:, None] * clean / (1 - after[:, None])) / precision
    np.testing.assert_allclose(given.mean, mean, atol=1e-6)
    np.testing.assert_allclose(given.std[:, None], precision**-0.5, rtol=1e-6)


def test_ddpm_is_ddim_with_eta_one_ending_in_clean_latents():
    grid = trailing_timesteps(10)
    jax.tree.map(
        np.testing.assert_array_equal, ddpm_steps(SD, grid), ddim_steps(SD, grid, eta=1.0, last_alpha_cumprod=1.0)
    )


def test_std_is_linear_in_eta_and_the_state_keeps_its_variance():
    one, half = (ddim_steps(SD, LEADING8, eta=eta) for eta in (1.0, 0.5))
    np.testing.assert_allclose(np.asarray(half.std), 0.5 * np.asarray(one.std), rtol=1e-6)
    for steps in (one, half):
        after = np.append(SD.alphas_cumprod[LEADING8[1:]], SD.alphas_cumprod[0])
        np.testing.assert_allclose(steps.noise**2 + np.asarray(steps.std) ** 2, 1 - after, rtol=1e-5)


def test_all_parameterisations_give_one_transition():
    state = jax.random.normal(jax.random.key(0), (2, 5))
    step = take_steps(CASES["ddim_eta"][0], 3)
    means = [
        transition(step, denoise(gaussian_model(SD, kind), state, step, None, kind)).mean
        for kind in (predicts_noise, predicts_clean, predicts_velocity)
    ]
    np.testing.assert_allclose(means[1:], np.broadcast_to(means[0], (2, 2, 5)), atol=2e-6)


def flow_reference(state, velocity, here, after, scale):
    """The step as it is written in velocities, float64."""
    dt = after - here
    drift = scale**2 / (2 * here)
    return state * (1 + drift * dt) + velocity * (1 + drift * (1 - here)) * dt, scale * np.sqrt(-dt)


@pytest.mark.parametrize("scales", [0.0, 0.3, "flow_grpo"])
def test_flow_steps_are_those_written_in_velocities(scales):
    sigmas = flow_sigmas(6, shift=3.0)
    scales = flow_noise_scales(sigmas) if isinstance(scales, str) else np.full(6, scales)
    rng = np.random.default_rng(0)
    state, velocity = rng.normal(size=(2, 6, 4))
    steps = flow_sde_steps(sigmas, scales)
    said = denoise(lambda *_: jnp.asarray(velocity), jnp.asarray(state), steps, None, predicts_flow)
    given = transition(steps, said)
    mean, std = flow_reference(
        state, velocity, *(v[:, None] for v in (sigmas[:-1], sigmas[1:], np.asarray(scales, np.float64)))
    )
    np.testing.assert_allclose(given.mean, mean, atol=2e-6)
    np.testing.assert_allclose(np.broadcast_to(given.std, 6), std[:, 0], rtol=1e-6)


def test_flow_noise_scales_take_the_next_level_at_pure_noise():
    sigmas = np.array([1.0, 0.8, 0.5, 0.0])
    np.testing.assert_allclose(flow_noise_scales(sigmas), 0.7 * np.sqrt([1 / 0.2, 0.8 / 0.2, 1.0]))


def test_no_noise_scale_is_the_ode_and_needs_no_key():
    sigmas = flow_sigmas(5)
    assert flow_sde_steps(sigmas, 0.0).std is None and flow_sde_steps(sigmas, np.eye(5)[2]).std is not None
    model = gaussian_model(None, predicts_flow)
    start = jax.random.normal(jax.random.key(0), (2, 3))
    given = sample(model, start, flow_sde_steps(sigmas, np.zeros(5)), parameterisation=predicts_flow)
    wanted = sample(model, start, flow_euler_steps(sigmas), parameterisation=predicts_flow)
    np.testing.assert_array_equal(given.latents, wanted.latents)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_flow_sde_keeps_the_marginals_for_any_noise_scale(scale):
    start = jax.random.normal(jax.random.key(0), (1, 40_000))
    steps = flow_sde_steps(np.linspace(1, 0, 201), scale)
    end = sample(
        gaussian_model(None, predicts_flow), start, steps, parameterisation=predicts_flow, key=jax.random.key(1)
    ).latents
    assert float(jnp.mean(end)) == pytest.approx(MEAN, abs=0.01)
    assert float(jnp.std(end)) == pytest.approx(SPREAD, abs=0.015)


def test_ancestral_sampling_reaches_the_data():
    start = jax.random.normal(jax.random.key(0), (1, 40_000))
    steps = ddpm_steps(SD, trailing_timesteps(250))
    end = sample(
        gaussian_model(SD, predicts_noise), start, steps, parameterisation=predicts_noise, key=jax.random.key(1)
    ).latents
    assert float(jnp.mean(end)) == pytest.approx(MEAN, abs=0.02)
    assert float(jnp.std(end)) == pytest.approx(SPREAD, abs=0.015)


def test_log_prob_is_the_sum_of_gaussian_log_densities():
    rng = np.random.default_rng(0)
    mean, value = rng.normal(size=(2, 3, 2, 5))
    std = np.array([0.1, 1.0, 3.0])
    given = Transition(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))
    z = (value - mean) / std[:, None, None]
    wanted = np.sum(-0.5 * z**2 - np.log(std)[:, None, None] - 0.5 * math.log(2 * math.pi), (1, 2))
    np.testing.assert_allclose(jax.jit(log_prob)(given, jnp.asarray(value)), wanted, rtol=1e-5)
    best = log_prob(given, given.mean)
    assert jnp.all(best > log_prob(given, given.mean + 0.01))


def test_log_prob_of_bfloat16_values_is_computed_in_float32():
    value = jax.random.normal(jax.random.key(0), (2, 1000), jnp.bfloat16)
    given = Transition(jnp.full((2, 1000), 0.25), jnp.float32(0.01))
    wanted = log_prob(given, value.astype(jnp.float32))
    assert log_prob(given, value).dtype == jnp.float32
    np.testing.assert_array_equal(log_prob(given, value), wanted)


def test_gradient_of_log_prob_in_the_mean():
    value, mean = jax.random.normal(jax.random.key(0), (2, 3, 4))
    gradient = jax.grad(lambda m: jnp.sum(log_prob(Transition(m, jnp.float32(0.5)), value)))(mean)
    np.testing.assert_allclose(gradient, (value - mean) / 0.25, rtol=1e-5, atol=1e-6)


def test_a_step_without_noise_has_neither_log_prob_nor_gradient():
    value, mean = jax.random.normal(jax.random.key(0), (2, 2, 4))
    score = lambda m: log_prob(Transition(m, jnp.array([0.0, 1.0])), value)  # noqa: E731
    assert score(mean)[0] == 0 and score(mean)[1] != 0
    gradient = jax.grad(lambda m: jnp.sum(score(m)))(mean)
    assert not gradient[0].any() and gradient[1].all()


def test_log_prob_of_draws_has_the_entropy_as_mean():
    given = Transition(jnp.zeros((50_000, 1)), jnp.float32(0.3))
    logps = log_prob(given, draw(given, jax.random.key(0)))
    assert float(jnp.mean(logps)) == pytest.approx(-math.log(0.3) - 0.5 * math.log(2 * math.pi) - 0.5, abs=0.02)


def test_a_step_per_example_is_the_row_of_the_table():
    steps = CASES["ddim_eta"][0]
    clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 4))
    index = jnp.array([0, 7, 3])
    together = jax.jit(lambda i: transition(take_steps(steps, i), Denoised(clean, noise)))(index)
    for row, i in enumerate([0, 7, 3]):
        alone = transition(take_steps(steps, i), Denoised(clean[row : row + 1], noise[row : row + 1]))
        np.testing.assert_allclose(together.mean[row], alone.mean[0], atol=1e-6)
        np.testing.assert_array_equal(together.std[row], alone.std)
    assert take_steps(steps, slice(2, 5)).time.shape == (3,)


def test_grids_of_each_examples_own():
    grids = np.stack([leading_timesteps(5), trailing_timesteps(5)], 1)  # [S, B]
    steps = ddim_steps(SD, grids, eta=1.0)
    start = jax.random.normal(jax.random.key(0), (2, 6))
    model = gaussian_model(SD, predicts_noise)
    deterministic = sample(model, start, ddim_steps(SD, grids), parameterisation=predicts_noise).latents
    for row in range(2):
        alone = ddim_steps(SD, grids[:, row])
        end = sample(model, start[row : row + 1], alone, parameterisation=predicts_noise).latents
        np.testing.assert_allclose(deterministic[row], end[0], atol=1e-6)
        np.testing.assert_array_equal(
            np.asarray(steps.std)[:, row], np.asarray(ddim_steps(SD, grids[:, row], eta=1.0).std)
        )


def test_every_timestep_and_the_ends_of_tables_are_finite():
    for schedule in (SD, with_zero_terminal_snr(SD), cosine_schedule()):
        for last in (None, 1.0):
            steps = ddim_steps(schedule, np.arange(999, -1, -1), eta=1.0, last_alpha_cumprod=last)
            assert all(np.all(np.isfinite(table)) for table in jax.tree.leaves(steps))
        assert np.asarray(steps.std)[-1] == 0
    assert posterior_variance(np.array(0.0), np.array(0.2)) == pytest.approx(0.8)


def test_exact_map_of_gaussian_data_is_approached():
    start = jax.random.normal(jax.random.key(0), (1, 64))
    steps = ddim_steps(SD, leading_timesteps(250), last_alpha_cumprod=1.0)
    end = sample(gaussian_model(SD, predicts_noise), start, steps, parameterisation=predicts_noise).latents
    exact = gaussian_flow(start, (steps.alpha[0], steps.sigma[0]))
    assert np.abs(end - exact).max() < 0.018


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ddim_steps(SD, np.array([1, 500])), "do not fall"),
        (lambda: ddim_steps(SD, np.array([1000, 500])), "do not fall"),
        (lambda: ddim_steps(SD, np.array([5, -1])), "do not fall"),
        (lambda: ddim_steps(SD, np.array([900.0, 1.0])), "give integers"),
        (lambda: ddim_steps(SD, np.array([900, 1]), last_alpha_cumprod=0.1), "below that of its timestep"),
        (lambda: ddim_steps(SD, np.array([900, 1]), eta=1.5), "eta is 1.5"),
        (lambda: flow_sde_steps(np.array([0.0, 1.0]), 0.1), "do not fall"),
        (lambda: flow_sde_steps(np.array([1.5, 1.0]), 0.1), "do not fall"),
    ],
)
def test_wrong_grids_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
