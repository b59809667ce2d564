"""Inversion against diffusers and linear algebra, round trips on exact models, per-example timesteps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_mode_model as world
from exact_models import EVEN, EXPECTED, gaussian_flow, gaussian_model, mixture_model, network

from dpo_jax.diffusion.inversion import averaged, fixed_point, fresh_noise, invert, undo_step
from dpo_jax.diffusion.sampler import (
    Guidance,
    denoise,
    dpm_solver_steps,
    euler_steps,
    flow_euler_steps,
    guided,
    sample,
)
from dpo_jax.diffusion.schedule import (
    flow_sigmas,
    implied_noise,
    leading_timesteps,
    level_at,
    predicts_clean,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
    scaled_linear_schedule,
    trailing_timesteps,
    with_zero_terminal_snr,
)
from dpo_jax.diffusion.transitions import ddim_steps, take_steps, transition
from dpo_jax.worlds import two_modes

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SD = scaled_linear_schedule()
ZERO_SNR = with_zero_terminal_snr(SD)
TEN = ddim_steps(SD, leading_timesteps(10))
CENTRES = np.array([[1.0, 0.0], [-0.5, 0.8], [0.0, -1.0]])


def start(shape=(2, 3, 4), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def inverted(model, latents, steps=TEN, condition=None, parameterisation=predicts_noise, **options):
    run = jit(lambda x, c: invert(model, x, steps, c, parameterisation=parameterisation, **options))
    return run(latents, condition)


def round_trips(model, latents, steps, parameterisation, all_weights, condition=None):
    """Mean square of what inversion and sampling together change, for each of several weights of equal length."""

    @jit
    def run(latents, condition, weights):
        noise = invert(model, latents, steps, condition, parameterisation=parameterisation, weights=weights).latents
        end = sample(model, noise, steps, condition, parameterisation=parameterisation).latents
        return jnp.mean((end - latents) ** 2)

    return [float(run(latents, condition, weights)) for weights in all_weights]


def test_plain_inversion_is_that_of_diffusers():
    states = EXPECTED["inverse/latents"]
    steps = ddim_steps(SD, leading_timesteps(8))
    np.testing.assert_array_equal(steps.time[::-1], EXPECTED["inverse/times"])
    given = inverted(network, jnp.asarray(states[0]), steps, record=True)
    np.testing.assert_allclose(np.moveaxis(given.states, 0, 1), states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [predicts_noise, predicts_clean, predicts_velocity, predicts_flow])
@pytest.mark.parametrize("steps", [TEN, flow_euler_steps(flow_sigmas(4, shift=1.0, lowest=0.4))], ids=["ddim", "flow"])
def test_undoing_a_step_is_exact_with_the_prediction_of_the_sampler(steps, kind):
    before, said = start(seed=1), start(seed=2)
    step = take_steps(steps, 1)
    after = transition(step, denoise(lambda *_: said, before, step, None, kind)).mean
    np.testing.assert_allclose(undo_step(after, said, step, kind), before, atol=2e-5)


def test_a_linear_model_has_the_fixed_point_of_linear_algebra():
    """y = sqrt(b/a) z + g M y, so y = (I - g M)^-1 sqrt(b/a) z, float64."""
    rng = np.random.default_rng(0)
    matrix = 0.5 * np.linalg.qr(rng.normal(size=(5, 5)))[0]
    latents = rng.normal(size=(3, 5))
    steps = take_steps(ddim_steps(SD, np.array([501, 401])), slice(0, 1))  # from 401 to 501
    a, b = SD.alphas_cumprod[[401, 501]]
    g = np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)
    exact = np.linalg.solve(np.eye(5) - g * matrix, np.sqrt(b / a) * latents.T).T

    def model(x, *_):
        return x @ jnp.asarray(matrix.T, jnp.float32)

    errors = [
        np.abs(inverted(model, jnp.asarray(latents), steps, weights=fixed_point(k)).latents - exact).max()
        for k in (1, 2, 3, 12)
    ]
    assert errors[-1] < 2e-6 and errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_weights_name_the_papers_steps():
    np.testing.assert_array_equal(fixed_point(1), [1])
    np.testing.assert_array_equal(fixed_point(3), [0, 0, 1])
    np.testing.assert_array_equal(averaged(0, 2), [0.5, 0.5])
    np.testing.assert_allclose(averaged(1, 3, 5), [0, 0.5, 0.5, 0, 0])
    for wrong in ((2, 2), (-1, 2), (0, 3, 2)):
        with pytest.raises(ValueError, match="no predictions"):
            averaged(*wrong)


def test_one_averaged_step_written_out():
    """SmPO's step: two predictions, both at the destination, moved from where the step began."""
    steps, z = take_steps(TEN, slice(4, 5)), start()
    a, b = SD.alphas_cumprod[[401, 501]]

    def transfer(e):
        return np.sqrt(b / a) * z + (np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)) * e

    first = network(z, jnp.full(2, 501.0), None)
    second = network(transfer(first), jnp.full(2, 501.0), None)
    given = inverted(network, z, steps, weights=averaged(0, 2), record=True)
    np.testing.assert_allclose(given.latents, transfer((first + second) / 2), atol=1e-5)
    np.testing.assert_allclose(given.predictions[:, 0], (first + second) / 2, atol=1e-5)


def test_predictions_that_do_not_depend_on_latents_need_one_call():
    model = lambda x, t, c: jnp.sin(t)[:, None, None] + c  # noqa: E731
    ends = [
        inverted(model, start(), condition=start(seed=3), weights=w).latents
        for w in (fixed_point(1), fixed_point(4), averaged(0, 3))
    ]
    np.testing.assert_allclose(ends[1:], np.stack([ends[0]] * 2), atol=1e-5)
    assert round_trips(model, start(), TEN, predicts_noise, [fixed_point(1)], start(seed=3))[0] < 1e-9


MODELS = {
    "gaussian noise": (gaussian_model(SD, predicts_noise), TEN, predicts_noise),
    "gaussian velocity": (gaussian_model(SD, predicts_velocity), TEN, predicts_velocity),
    "gaussian flow": (
        gaussian_model(None, predicts_flow),
        flow_euler_steps(flow_sigmas(10, shift=1.0, lowest=0.1)),
        predicts_flow,
    ),
    "mixture noise": (mixture_model(SD, predicts_noise, CENTRES, 0.5), TEN, predicts_noise),
    "mixture velocity": (
        mixture_model(ZERO_SNR, predicts_velocity, CENTRES, 0.5),
        ddim_steps(ZERO_SNR, trailing_timesteps(10)),
        predicts_velocity,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_refinement_brings_the_round_trip_to_the_identity(name):
    model, steps, kind = MODELS[name]
    latents = jnp.asarray(CENTRES[np.arange(12) % 3], jnp.float32) + 0.5 * start((12, 2))
    of_thirty = [averaged(calls - 1, calls, 30) for calls in (1, 2, 5, 30)]
    *errors, mean_of_two = round_trips(model, latents, steps, kind, [*of_thirty, averaged(0, 2, 30)])
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert errors[3] < 1e-9, errors
    assert mean_of_two < errors[0]


def test_one_refinement_beats_twice_the_steps_at_equal_calls():
    model, latents = gaussian_model(SD, predicts_noise), 0.6 + 0.4 * start((64, 2))
    few, many = (ddim_steps(SD, leading_timesteps(n)) for n in (10, 20))
    refined = round_trips(model, latents, few, predicts_noise, [fixed_point(2)])
    assert refined < round_trips(model, latents, many, predicts_noise, [fixed_point(1)])


def test_inversion_follows_the_probability_flow_at_first_order():
    """Gaussian data go where the flow leads them; the error halves with twice the steps."""
    model, latents = gaussian_model(EVEN, predicts_noise), 0.6 + 0.4 * start((1, 64))
    here, there = (tuple(np.asarray(v) for v in level_at(EVEN, np.array(t))) for t in (0, 40_000))
    exact, errors = gaussian_flow(latents, here, there), []
    for n in (32, 64, 128):
        steps = ddim_steps(EVEN, np.round(np.linspace(0, 40_000, n + 1)).astype(int)[:0:-1])
        errors.append(np.abs(inverted(model, latents, steps).latents - exact).max())
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / errors[1:]), 1.0, atol=0.06)


def test_grids_of_each_examples_own():
    grids = np.stack([leading_timesteps(5), trailing_timesteps(5)], 1)  # [S, B]
    until = jnp.array([500, 400])
    together = inverted(network, start(), ddim_steps(SD, grids), until=until)
    np.testing.assert_array_equal(together.timesteps, [401, 399])
    for row in range(2):
        alone = inverted(network, start()[row : row + 1], ddim_steps(SD, grids[:, row]), until=until[row : row + 1])
        np.testing.assert_allclose(together.latents[row], alone.latents[0], rtol=1e-5, atol=1e-5)


def test_guidance_in_the_inversion():
    condition = Guidance(0.3 * start(seed=1), 0.3 * start(seed=2))
    unguided = inverted(network, start(), condition=condition.positive).latents
    one = inverted(guided(network, 1.0), start(), condition=condition).latents
    np.testing.assert_allclose(one, unguided, atol=1e-6)
    two = guided(lambda *inputs: 0.3 * network(*inputs), 2.0)
    of_twelve = [averaged(calls - 1, calls, 12) for calls in (1, 3, 12)]
    errors = round_trips(two, start(), TEN, predicts_noise, of_twelve, condition)
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_every_example_stops_at_its_own_timestep():
    until = jnp.array([0, 1, 2, 101, 102, 555, 999])
    latents = start((7, 3))
    given = inverted(network, latents, until=until, weights=averaged(0, 2))
    np.testing.assert_array_equal(given.timesteps, [0, 0, 1, 1, 101, 501, 901])
    np.testing.assert_array_equal(given.latents[:2], latents[:2])
    for row, limit in enumerate(until):
        taken = int(np.sum(TEN.time < limit))
        if taken:
            alone = inverted(
                network, latents[row : row + 1], take_steps(TEN, slice(10 - taken, None)), weights=averaged(0, 2)
            )
            np.testing.assert_allclose(given.latents[row], alone.latents[0], rtol=1e-5, atol=1e-5)
    order = jnp.array([6, 2, 0, 1, 3, 5, 4])
    permuted = inverted(network, latents[order], until=until[order], weights=averaged(0, 2))
    np.testing.assert_allclose(permuted.latents, given.latents[order], rtol=1e-5, atol=1e-5)


def test_the_noise_an_exact_inversion_implies_is_what_the_model_predicts():
    """One exact step from clean latents: tau is the prediction; t below the grid: tau is x0 scaled."""
    steps = ddim_steps(SD, np.array([300]), last_alpha_cumprod=1.0)
    latents = start()
    given = inverted(network, latents, steps, record=True)
    tau = implied_noise(given.latents, latents, level_at(SD, given.timesteps))
    np.testing.assert_allclose(tau, given.predictions[:, 0], atol=1e-5)
    unmoved = implied_noise(latents, latents, level_at(SD, jnp.array([1, 1])))
    abar = SD.alphas_cumprod[1]
    np.testing.assert_allclose(unmoved, latents * (1 - np.sqrt(abar)) / np.sqrt(1 - abar), rtol=1e-3)


def test_weights_of_each_step():
    """Timesteps below 250 average five predictions, later ones the last two of ten."""
    table = np.where(TEN.time[:, None] < 250, averaged(0, 5, 10), averaged(8, 10))
    model, latents = gaussian_model(SD, predicts_noise), start((4, 2))
    whole = inverted(model, latents, weights=table).latents
    low = inverted(model, latents, take_steps(TEN, slice(7, None)), weights=averaged(0, 5)).latents
    high = inverted(model, low, take_steps(TEN, slice(0, 7)), weights=averaged(8, 10)).latents
    np.testing.assert_allclose(whole, high, atol=1e-5)


def test_fresh_noise_has_the_published_variance_and_is_clipped_at_the_tables_end():
    std = fresh_noise(SD, leading_timesteps(10), eta=0.1)
    abar = SD.alphas_cumprod
    for i, s in enumerate(leading_timesteps(10)):
        above = abar[min(s + 100, 999)]
        wanted = 0.1 * np.sqrt((1 - abar[s]) / (1 - above) * (1 - above / abar[s]))
        assert std[i] == pytest.approx(wanted, rel=1e-6)
    quiet = lambda x, *_: jnp.zeros_like(x)  # noqa: E731
    steps = take_steps(TEN, slice(9, None))
    noisy = inverted(quiet, jnp.zeros((1, 50_000)), steps, std=std[9:], key=jax.random.key(0)).latents
    assert float(jnp.std(noisy)) == pytest.approx(float(std[9]), rel=0.02)
    until = jnp.array([1, 900])
    noisy = inverted(network, start(), until=until, std=std, key=jax.random.key(0)).latents
    np.testing.assert_array_equal(noisy[0], start()[0])


def test_recorded_states_start_at_the_given_latents_and_end_at_the_last():
    given = inverted(network, start(), record=True)
    assert given.states.shape == (2, 11, 3, 4) and given.predictions.shape == (2, 10, 3, 4)
    np.testing.assert_array_equal(given.states[:, 0], start())
    np.testing.assert_array_equal(given.states[:, -1], given.latents)
    times = jnp.full(2, TEN.time[-3])
    np.testing.assert_allclose(given.predictions[:, 2], network(given.states[:, 2], times, None), rtol=1e-5, atol=1e-5)


def test_a_grid_that_begins_at_timestep_zero_first_stays_where_it_is():
    steps = ddim_steps(SD, leading_timesteps(10, steps_offset=0))
    given = inverted(network, start(), steps, record=True)
    np.testing.assert_allclose(given.states[:, 1], start(), atol=1e-6)
    assert jnp.all(jnp.isfinite(given.latents))


def test_zero_terminal_snr_is_reached_and_left_again():
    steps = ddim_steps(ZERO_SNR, trailing_timesteps(20))
    model = gaussian_model(ZERO_SNR, predicts_velocity)
    latents = 0.6 + 0.4 * start((16, 2))
    assert float(steps.alpha[0]) == 0
    assert round_trips(model, latents, steps, predicts_velocity, [fixed_point(30)])[0] < 1e-9


def test_round_trips_of_a_trained_network_get_closer_with_iterations_and_with_steps():
    model, points = partial(world.predict, world.base_model(steps=600)), two_modes.make_points(256, 0)
    latents, classes = jnp.asarray(points.points), jnp.asarray(points.classes)

    def errors(count, all_weights):
        steps = ddim_steps(world.SCHEDULE, leading_timesteps(count))
        return np.array(round_trips(model, latents, steps, predicts_noise, all_weights, classes))

    by_iterations = errors(10, [averaged(k, k + 1, 10) for k in (0, 1, 4, 9)])
    assert np.all(by_iterations[1:] < by_iterations[:-1] / 2), by_iterations
    assert by_iterations[-1] < by_iterations[0] / 1000, by_iterations
    by_steps = np.array([errors(count, [fixed_point(2)])[0] for count in (5, 10, 20)])
    assert np.all(by_steps[1:] < by_steps[:-1] / 2), by_steps


def test_memory_of_the_backward_pass_grows_by_states_only():
    """The network's activations are 64 times a state; keeping those of 24 more steps would cost 200 MB."""
    batch, width, hidden = 256, 64, 4096

    def temporaries(count):
        steps = ddim_steps(SD, leading_timesteps(count))

        def loss(weights):
            def predict(latents, timesteps, condition):
                inner = jnp.tanh(latents @ weights["in"] + timesteps[:, None] / 1000)
                return jnp.sin(inner) @ weights["out"]

            clean = jnp.ones((batch, width))
            end = invert(predict, clean, steps, parameterisation=predicts_noise, weights=fixed_point(2))
            return jnp.sum(end.latents**2)

        weights = {"in": jnp.zeros((width, hidden)), "out": jnp.zeros((hidden, width))}
        analysis = jit(jax.grad(loss)).lower(weights).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    state = batch * width * 4
    few, many = temporaries(8), temporaries(32)
    assert 0.5 * 24 * state < many - few < 2 * 24 * state, (few, many)
    assert many < 20 * batch * hidden * 4


def test_bfloat16_is_computed_in_float32_and_gradients_are_finite():
    low = start().astype(jnp.bfloat16)
    given = inverted(lambda *inputs: network(*inputs).astype(jnp.bfloat16), low)
    assert given.latents.dtype == jnp.float32

    def end(latents, weight):
        model = lambda *inputs: weight * network(*inputs)  # noqa: E731
        return jnp.sum(invert(model, latents, TEN, parameterisation=predicts_noise, weights=fixed_point(3)).latents)

    slopes = jit(jax.grad(end, argnums=(0, 1)))(start(), 0.5)
    step = 1e-2
    rise = (jit(end)(start(), 0.5 + step) - jit(end)(start(), 0.5 - step)) / (2 * step)
    np.testing.assert_allclose(slopes[1], rise, rtol=1e-2)
    assert jnp.all(jnp.isfinite(slopes[0]))


@pytest.mark.parametrize(
    ("steps", "kind", "options", "message"),
    [
        (ddim_steps(SD, leading_timesteps(5), eta=0.5), predicts_noise, {}, "only deterministic"),
        (dpm_solver_steps(SD, leading_timesteps(5)), predicts_noise, {}, "only deterministic"),
        (euler_steps(SD, leading_timesteps(5)), predicts_clean, {}, "forgets where it came from"),
        (TEN, predicts_noise, {"weights": np.ones((3, 2)) / 2}, "for 10 steps"),
        (TEN, predicts_noise, {"weights": (0.5, 0.6)}, "do not sum to 1"),
        (TEN, predicts_noise, {"std": np.ones(10)}, "give a key"),
    ],
)
def test_wrong_use_is_refused(steps, kind, options, message):
    with pytest.raises(ValueError, match=message):
        invert(network, start(), steps, parameterisation=kind, **options)
