"""Samplers against diffusers, orders of convergence, guidance, recording, memory of the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import EVEN, EXPECTED, gaussian_flow, gaussian_model, level_of, mixture_model, network

from dpo_jax.diffusion.sampler import (
    Guidance,
    combine_guidance,
    dpm_solver_steps,
    euler_steps,
    flow_euler_steps,
    guided,
    sample,
    trajectory_logps,
)
from dpo_jax.diffusion.schedule import (
    flow_sigmas,
    leading_timesteps,
    linspace_timesteps,
    predicts_clean,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
    scaled_linear_schedule,
    trailing_timesteps,
    with_zero_terminal_snr,
)
from dpo_jax.diffusion.transitions import ddim_steps, ddpm_steps, flow_noise_scales, flow_sde_steps, take_steps

SD = scaled_linear_schedule()
ZERO_SNR = with_zero_terminal_snr(SD)
LEADING8 = leading_timesteps(8)
# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


denoising = partial(sample, parameterisation=predicts_noise)


def noise_sample(model, latents, steps, condition=None, **options):
    """`denoising`, compiled."""
    return jit(lambda x, c: denoising(model, x, steps, c, **options))(latents, condition)


CASES = {
    "ddim": (ddim_steps(SD, LEADING8), predicts_noise),
    "ddim_velocity": (ddim_steps(SD, LEADING8), predicts_velocity),
    "euler_leading": (euler_steps(SD, LEADING8), predicts_noise),
    "euler_linspace": (euler_steps(SD, np.linspace(999, 0, 7)), predicts_noise),
    "euler_velocity": (euler_steps(SD, trailing_timesteps(8)), predicts_velocity),
    "dpm_linspace": (dpm_solver_steps(SD, linspace_timesteps(9)[:-1]), predicts_noise),
    "dpm_leading": (dpm_solver_steps(SD, leading_timesteps(21)[:-1]), predicts_noise),
    "dpm_velocity": (dpm_solver_steps(SD, trailing_timesteps(10)), predicts_velocity),
    "flow": (flow_euler_steps(flow_sigmas(7)), predicts_flow),
    "flow_dynamic": (flow_euler_steps(flow_sigmas(5, shift=float(np.exp(0.9)), lowest=1 / 5)), predicts_flow),
}


def start(shape=(2, 3, 4), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", CASES)
def test_every_state_of_a_rollout_is_that_of_diffusers(name):
    steps, parameterisation = CASES[name]
    np.testing.assert_allclose(steps.time, EXPECTED[f"{name}/times"], rtol=1e-6)
    states = np.asarray(EXPECTED[f"{name}/latents"], np.float64)
    if name.startswith("euler"):  # their latents are x / alpha
        states = states / np.sqrt(1 + EXPECTED[f"{name}/sigmas"].astype(np.float64) ** 2).reshape(-1, 1, 1, 1, 1)
    run = jit(partial(sample, network, steps=steps, parameterisation=parameterisation, record=(0, len(states) - 1)))
    given = run(latents=jnp.asarray(states[0]))
    np.testing.assert_allclose(np.moveaxis(given.trajectory.latents, 0, 1), states, rtol=1e-5, atol=1e-5)
    assert not given.trajectory.logps.any()


def test_euler_at_whole_timesteps_is_ddim_ending_in_clean_latents():
    euler, ddim = euler_steps(SD, LEADING8), ddim_steps(SD, LEADING8, last_alpha_cumprod=1.0)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), euler, ddim)


def error_of_gaussian(schedule, steps, parameterisation, end):
    """Largest distance from where the probability flow of Gaussian data leads at the level `end`, float64."""
    latents = start((1, 64))
    model = gaussian_model(schedule, parameterisation)
    state = jit(lambda x: sample(model, x, steps, parameterisation=parameterisation).latents)(latents)
    return np.abs(state - gaussian_flow(latents, (steps.alpha[0], steps.sigma[0]), end)).max()


def even_steps(make):
    """A sampler's steps to the first entry of EVEN, not to clean latents: those lie at log SNR infinity."""
    grids = {n: np.round(np.linspace(60_000, 0, n + 1)).astype(int) for n in COUNTS}
    return lambda n: (EVEN, take_steps(make(EVEN, grids[n]), slice(0, -1)), predicts_noise, level_of(EVEN, 0))


COUNTS = (32, 64, 128)
CONVERGENT = {
    "ddim": (even_steps(ddim_steps), 1),
    "euler": (even_steps(euler_steps), 1),
    "dpm_solver": (even_steps(dpm_solver_steps), 2),
    "flow": (lambda n: (None, flow_euler_steps(flow_sigmas(n, shift=1.0, lowest=1 / n)), predicts_flow, (1, 0)), 1),
}


@pytest.mark.parametrize("name", CONVERGENT)
def test_order_of_convergence_on_gaussian_data(name):
    make, order = CONVERGENT[name]
    errors = np.array([error_of_gaussian(*make(n)) for n in COUNTS])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.06)


@pytest.mark.parametrize("make", [partial(ddim_steps, last_alpha_cumprod=1.0), euler_steps, dpm_solver_steps])
def test_zero_terminal_snr_starts_at_pure_noise(make):
    grid = trailing_timesteps(50)
    for parameterisation in (predicts_velocity, predicts_clean):
        assert error_of_gaussian(ZERO_SNR, make(ZERO_SNR, grid), parameterisation, (1, 0)) < 0.08
    with pytest.raises(ValueError, match="predicts_noise does not tell the clean latents"):
        noise_sample(network, start(), make(ZERO_SNR, grid))


def test_all_samplers_split_a_mixture_alike():
    centres, spread = np.array([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]]), 0.2
    latents = start((300, 2))
    tables = {
        "ddim": (ddim_steps(SD, trailing_timesteps(100), last_alpha_cumprod=1.0), predicts_noise),
        "dpm": (dpm_solver_steps(SD, trailing_timesteps(40)), predicts_velocity),
        "ancestral": (ddpm_steps(SD, trailing_timesteps(200)), predicts_clean),
    }
    for steps, kind in tables.values():
        model = mixture_model(SD, kind, centres, spread)
        run = jit(partial(sample, model, steps=steps, parameterisation=kind, key=jax.random.key(3)))
        end = run(latents=latents).latents
        distance = np.linalg.norm(np.asarray(end)[:, None] - centres, axis=-1)
        assert np.mean(distance.min(1) < 4 * spread) > 0.97
        np.testing.assert_allclose(np.bincount(distance.argmin(1)) / 300, 1 / 3, atol=0.1)


def test_a_constant_velocity_is_integrated_in_one_step():
    clean, noise = start(seed=1), start(seed=2)
    steps = flow_euler_steps(flow_sigmas(1))
    end = sample(lambda *_: noise - clean, noise, steps, parameterisation=predicts_flow).latents
    np.testing.assert_allclose(end, clean, atol=1e-6)


def test_guidance_scales():
    c, u = start(seed=1), start(seed=2)
    np.testing.assert_allclose(combine_guidance(c, u, 1.0), c, atol=1e-6)
    np.testing.assert_allclose(combine_guidance(c, u, 0.0), u, atol=1e-6)
    per_example = combine_guidance(c, u, jnp.array([7.5, 0.0]))
    np.testing.assert_allclose(per_example[0], (u + 7.5 * (c - u))[0], atol=1e-5)
    np.testing.assert_allclose(combine_guidance(c, c, 7.5), c, atol=1e-6)


def test_guidance_rescale_restores_the_standard_deviation():
    c, u = start((2, 4, 4, 3), 1), start((2, 4, 4, 3), 2)
    plain = np.asarray(combine_guidance(c, u, 6.0), np.float64)
    deviation = lambda v: np.std(np.asarray(v, np.float64), axis=(1, 2, 3), ddof=1, keepdims=True)  # noqa: E731
    whole = combine_guidance(c, u, 6.0, rescale=1.0)
    np.testing.assert_allclose(deviation(whole), deviation(c), rtol=1e-5)
    wanted = 0.7 * plain * deviation(c) / deviation(plain) + 0.3 * plain
    np.testing.assert_allclose(combine_guidance(c, u, 6.0, rescale=0.7), wanted, rtol=1e-4, atol=1e-5)
    assert jnp.all(jnp.isfinite(combine_guidance(0 * c, 0 * u, 6.0, rescale=0.7)))


def scaled_network(weight):
    return lambda latents, timesteps, condition: weight * network(latents, timesteps, condition)


def test_one_network_and_two_equal_networks_guide_alike():
    steps, condition = ddim_steps(SD, LEADING8), Guidance(start(seed=1), start(seed=2))
    one = noise_sample(guided(network, 4.0), start(), steps, condition).latents
    two = noise_sample(guided(network, 4.0, negative_predict=network), start(), steps, condition).latents
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_two_networks_with_parameters_of_their_own():
    steps, condition = take_steps(ddim_steps(SD, LEADING8), slice(0, 1)), Guidance(start(seed=1), start(seed=2))
    latents, times = start(), jnp.full(2, float(LEADING8[0]))

    def end(positive, negative):
        model = guided(scaled_network(positive), 3.0, negative_predict=scaled_network(negative))
        return model(latents, times, condition)

    wanted = 3.0 * 1.5 * network(latents, times, condition.positive) - 2.0 * 0.5 * network(
        latents, times, condition.negative
    )
    np.testing.assert_allclose(end(1.5, 0.5), wanted, rtol=1e-5, atol=1e-5)
    slopes = [jax.grad(lambda *w: jnp.sum(end(*w)), argnums=i)(1.0, 1.0) for i in (0, 1)]
    sums = [float(jnp.sum(network(latents, times, c))) for c in condition]
    np.testing.assert_allclose(slopes, [3.0 * sums[0], -2.0 * sums[1]], rtol=1e-4)
    assert noise_sample(
        guided(scaled_network(1.0), 3.0, negative_predict=scaled_network(0.5)), latents, steps, condition
    )


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 2), (5.0, 4)])
def test_rows_the_network_sees(scale, rows):
    seen = []

    def counting(latents, timesteps, condition):
        seen.append((latents.shape[0], timesteps.shape[0], condition["text"].shape[0]))
        return latents

    condition = Guidance({"text": jnp.zeros((2, 5))}, {"text": jnp.ones((2, 5))})
    noise_sample(guided(counting, scale), start(), ddim_steps(SD, LEADING8), condition)
    assert set(seen) == {(rows, rows, rows)}


def test_recorded_windows_are_parts_of_the_whole():
    steps, key = ddim_steps(SD, LEADING8, eta=1.0), jax.random.key(5)
    whole = noise_sample(network, start(), steps, key=key, record=(0, 8))
    window = noise_sample(network, start(), steps, key=key, record=(2, 5))
    bare = noise_sample(network, start(), steps, key=key)
    assert whole.trajectory is not None and window.trajectory is not None and bare.trajectory is None
    assert whole.trajectory.latents.shape == (2, 9, 3, 4) and whole.trajectory.logps.shape == (2, 8)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(window.trajectory.latents, whole.trajectory.latents[:, 2:6])
    close(window.trajectory.logps, whole.trajectory.logps[:, 2:5])
    np.testing.assert_array_equal(whole.trajectory.latents[:, 0], start())
    for other in (window, bare):
        close(other.latents, whole.latents)
    np.testing.assert_array_equal(whole.trajectory.latents[:, -1], whole.latents)


@pytest.mark.parametrize("record", [(0, 9), (-1, 3), (3, 3), (5, 2)])
def test_windows_outside_of_the_steps_are_refused(record):
    with pytest.raises(ValueError, match="is no window of 8 steps"):
        noise_sample(network, start(), ddim_steps(SD, LEADING8), record=record)


def test_a_stochastic_table_without_a_key_is_refused():
    with pytest.raises(ValueError, match="give a key"):
        noise_sample(network, start(), ddim_steps(SD, LEADING8, eta=0.5))


def test_slices_of_a_table_run_one_after_the_other():
    steps = ddim_steps(SD, LEADING8)
    middle = noise_sample(network, start(), take_steps(steps, slice(0, 3))).latents
    end = noise_sample(network, middle, take_steps(steps, slice(3, None))).latents
    np.testing.assert_allclose(end, noise_sample(network, start(), steps).latents, atol=1e-6)


SDE = flow_sde_steps(flow_sigmas(6), flow_noise_scales(flow_sigmas(6)) * np.array([0, 1, 1, 1, 0, 0]))


@pytest.mark.parametrize(
    ("steps", "kind"), [(ddim_steps(SD, LEADING8, eta=1.0), predicts_noise), (SDE, predicts_flow)], ids=["ddim", "sde"]
)
def test_log_probs_of_a_recorded_trajectory_are_found_again(steps, kind):
    count = len(steps.time)
    options = {"steps": steps, "condition": start(seed=4), "parameterisation": kind}
    given = jit(partial(sample, network, key=jax.random.key(1), record=(0, count), **options))(latents=start())
    assert given.trajectory is not None
    again = jit(partial(trajectory_logps, network, **options))(latents=given.trajectory.latents)
    np.testing.assert_allclose(again, given.trajectory.logps, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(given.trajectory.logps).all(0), np.asarray(steps.std) > 0)
    with pytest.raises(ValueError, match="one state more"):
        trajectory_logps(network, given.trajectory.latents[:, 1:], steps, parameterisation=kind)


def test_gradient_of_trajectory_log_probs_is_that_of_the_closed_form():
    steps = ddim_steps(SD, LEADING8, eta=1.0)
    states = start((2, 9, 5))

    def total(weight):
        return jnp.sum(trajectory_logps(scaled_network(weight), states, steps, parameterisation=predicts_noise))

    def reference(weight):
        result = 0.0
        for i in range(8):
            x, after = states[:, i], states[:, i + 1]
            eps = weight * network(x, jnp.full(2, steps.time[i]), None)
            mean = steps.clean[i] * (x - steps.sigma[i] * eps) / steps.alpha[i] + steps.noise[i] * eps
            result -= jnp.sum((after - mean) ** 2) / (2 * np.asarray(steps.std)[i] ** 2)
        return result

    np.testing.assert_allclose(jit(jax.grad(total))(0.9), jit(jax.grad(reference))(0.9), rtol=1e-4)


def test_a_rollout_is_differentiable_to_the_model_and_to_the_start():
    steps = dpm_solver_steps(SD, linspace_timesteps(9)[:-1])
    latents = start((1, 3))

    def end(weight, latents):
        return jnp.sum(denoising(scaled_network(weight), latents, steps).latents)

    slope, at_start = jit(jax.grad(end, argnums=(0, 1)))(0.8, latents)
    end = jit(end)
    step = 1e-2
    np.testing.assert_allclose(slope, (end(0.8 + step, latents) - end(0.8 - step, latents)) / (2 * step), rtol=1e-2)
    assert jnp.all(jnp.isfinite(at_start)) and at_start.any()


def test_jit_vmap_and_rows_alone_agree():
    steps = dpm_solver_steps(SD, linspace_timesteps(9)[:-1])
    run = lambda x: denoising(network, x, steps).latents  # noqa: E731
    together = jit(run)(start())
    np.testing.assert_allclose(together[1:], run(start()[1:]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: run(x[None])[0])(start()), together, rtol=1e-5, atol=1e-5)


def test_tables_may_be_arguments_of_jit():
    run = jit(lambda steps: denoising(network, start(), steps).latents)
    for schedule_steps in (ddim_steps(SD, LEADING8), euler_steps(SD, LEADING8)):
        wanted = noise_sample(network, start(), schedule_steps).latents
        np.testing.assert_allclose(run(schedule_steps), wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_latents_and_predictions_are_computed_in_float32():
    steps = ddim_steps(SD, LEADING8)

    def rough(latents, timesteps, condition):
        assert latents.dtype == timesteps.dtype == jnp.float32
        return network(latents, timesteps, condition).astype(jnp.bfloat16)

    low = start().astype(jnp.bfloat16)
    given = noise_sample(rough, low, steps).latents
    assert given.dtype == jnp.float32
    fine = lambda *inputs: rough(*inputs).astype(jnp.float32)  # noqa: E731
    np.testing.assert_array_equal(given, noise_sample(fine, low.astype(jnp.float32), steps).latents)


def test_memory_of_the_backward_pass_grows_by_states_only():
    """The network's activations are 64 times a state; keeping those of 24 more steps would cost 100 MB."""
    batch, width, hidden = 256, 64, 4096

    def temporaries(count):
        steps = ddim_steps(SD, leading_timesteps(count), eta=1.0)

        def loss(weights):
            def predict(latents, timesteps, condition):
                inner = jnp.tanh(latents @ weights["in"] + timesteps[:, None] / 1000)
                return jnp.sin(inner) @ weights["out"]

            end = denoising(predict, jnp.ones((batch, width)), steps, key=jax.random.key(0))
            return jnp.sum(end.latents**2)

        weights = {"in": jnp.zeros((width, hidden)), "out": jnp.zeros((hidden, width))}
        analysis = jit(jax.grad(loss)).lower(weights).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    state = batch * width * 4
    few, many = temporaries(8), temporaries(32)
    assert many - few < 2 * 24 * state, (few, many)
    assert many < 10 * batch * hidden * 4
