"""The error kernel against float64 NumPy: every statistic of every parameterisation, trajectories, guidance, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from dpo_jax.diffusion.errors import Inputs, measure, noised_inputs
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import (
    predicts_clean,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
    scaled_linear_schedule,
)

SD = scaled_linear_schedule()
N = 6
TARGETS = {
    "noise": (predicts_noise, lambda alpha, sigma, clean, noise: noise),
    "clean": (predicts_clean, lambda alpha, sigma, clean, noise: clean),
    "velocity": (predicts_velocity, lambda alpha, sigma, clean, noise: alpha * noise - sigma * clean),
    "flow": (predicts_flow, lambda alpha, sigma, clean, noise: noise - clean),
}


def process_of(name, **options):
    kind = TARGETS[name][0]
    return Process(kind, None if name == "flow" else SD, **options)


def images(shape, seed=0):
    rng = np.random.default_rng(seed)
    clean, noise = rng.normal(size=(2, N, *shape))
    times = np.array([0.0, 17, 400, 999, 650, 3]) if seed == 0 else rng.integers(1000, size=N).astype(float)
    return clean, noise, times, rng.normal(size=(N, shape[-1]))


def numpy_predict(params, latents, times, condition):
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    ones = (1,) * (latents.ndim - 2)
    time = times.reshape(-1, *ones, 1) / 1000 * params["time"]
    return np.tanh(latents @ params["kernel"] + time + condition.reshape(len(times), *ones, -1))


def numpy_inputs(name, clean, noise, times):
    """Noisy latents and target in float64."""
    if name == "flow":
        sigma = times / 1000
        alpha = 1 - sigma
    else:
        alpha, sigma = (np.sqrt(x[times.astype(int)]) for x in (SD.alphas_cumprod, 1 - SD.alphas_cumprod))
    alpha, sigma = (x.reshape(-1, *(1,) * (clean.ndim - 1)) for x in (alpha, sigma))
    return alpha * clean + sigma * noise, TARGETS[name][1](alpha, sigma, clean, noise)


def float32(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4)], ids=["images", "frames"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_statistic_is_that_of_float64(name, shape):
    clean, noise, times, condition = images(shape)
    params, process = tiny_model.variables(), process_of(name)
    c, n, t, told = float32(clean, noise, times, condition)
    inputs = noised_inputs(clean=c, noise=n, times=t, condition=told, process=process)
    given = measure(partial(tiny_model.predict, params), inputs, process, ("error", "frame_error", "error_map", "pred"))
    latents, target = numpy_inputs(name, clean, noise, times)
    said = numpy_predict(params, latents, times, condition)
    square = (said - target) ** 2
    whole = tuple(range(1, square.ndim))
    assert {x.dtype for x in given.values()} == {jnp.float32.dtype}
    np.testing.assert_allclose(given["error"], square.mean(whole), rtol=2e-5)
    np.testing.assert_allclose(given["frame_error"], square.mean(whole[1:]), rtol=2e-5)
    np.testing.assert_allclose(given["error_map"], square.mean(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(given["pred"], said, atol=1e-5)


def test_error_of_a_half_precision_model_is_taken_in_float32():
    """Squares of bfloat16 would lose all but two digits; the target stays float32."""
    clean, noise, times, condition = images((8, 8, 4))
    inputs = noised_inputs(
        **dict(zip(("clean", "noise", "times", "condition"), float32(clean, noise, times, condition))),
        process=process_of("noise"),
    )
    half = measure(lambda x, t, c: x.astype(jnp.bfloat16), inputs, process_of("noise"), ("error", "pred"))
    rounded = np.asarray(inputs.latents.astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(half["error"], ((rounded - noise) ** 2).mean((1, 2, 3)), rtol=1e-5)
    assert half["pred"].dtype == jnp.float32


def trajectory(steps, shape=(3, 4), seed=0, guidance=1.0):
    rng = np.random.default_rng(seed)
    latents, target = rng.normal(size=(2, steps, N, *shape)).astype(np.float32)
    times = rng.integers(1000, size=(steps, N)).astype(np.float32)
    weights = rng.gamma(1.0, size=(steps, N)).astype(np.float32)
    condition = rng.normal(size=(N, shape[-1])).astype(np.float32)
    return Inputs(*map(jnp.asarray, (latents, times, target, condition, weights)), guidance)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_error_of_a_trajectory_is_the_weighted_sum_over_its_points(guidance):
    process = process_of("noise", empty=jnp.full((1, 4), 0.3))
    inputs = trajectory(5, guidance=guidance)

    def by_scan(params):
        return measure(partial(tiny_model.predict, params), inputs, process, ("error",))["error"]

    def by_hand(params):
        total = 0.0
        for s in range(5):
            told = tiny_model.predict(params, inputs.latents[s], inputs.times[s], inputs.condition)
            empty = tiny_model.predict(params, inputs.latents[s], inputs.times[s], jnp.full((N, 4), 0.3))
            said = empty + guidance * (told - empty)
            total += inputs.weights[s] * jnp.mean((said - inputs.target[s]) ** 2, axis=(1, 2))
        return total

    params, cotangent = tiny_model.variables(), jnp.arange(1.0, N + 1)
    given, back = (
        jax.jit(lambda p: jax.vjp(by_scan, p)[0])(params),
        jax.jit(lambda p: jax.vjp(by_scan, p)[1](cotangent)),
    )
    wanted, pull = jax.vjp(by_hand, params)
    np.testing.assert_allclose(given, wanted, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), back(params), pull(cotangent))


def test_memory_of_a_trajectory_does_not_grow_with_its_points():
    def temporaries(steps):
        inputs = trajectory(steps, shape=(64, 64, 4))

        def loss(params, inputs):
            wide = partial(tiny_model.predict, params)

            def model(x, t, c):
                for _ in range(4):
                    x = wide(x, t, c)
                return x

            return measure(model, inputs._replace(guidance=1.0), process_of("noise"), ("error",))["error"].sum()

        compiled = jax.jit(jax.grad(loss)).lower(tiny_model.variables(), inputs).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_state = N * 64 * 64 * 4 * 4
    few, many = temporaries(3), temporaries(24)
    assert many - few < one_state, (few, many)


def test_guidance_is_inside_the_error():
    clean, noise, times, condition = images((3, 5, 4))
    c, n, t, told = float32(clean, noise, times, condition)
    empty = np.array([[0.1, -0.2, 0.3, 0.4]])
    process = process_of("velocity", empty=jnp.asarray(empty, jnp.float32))
    inputs = noised_inputs(clean=c, noise=n, times=t, condition=told, process=process)._replace(guidance=3.0)
    params = tiny_model.variables()
    given = measure(partial(tiny_model.predict, params), inputs, process, ("error", "pred"))
    latents, target = numpy_inputs("velocity", clean, noise, times)
    positive, negative = (
        numpy_predict(params, latents, times, x) for x in (condition, np.broadcast_to(empty, condition.shape))
    )
    said = negative + 3 * (positive - negative)
    np.testing.assert_allclose(given["pred"], said, atol=2e-5)
    np.testing.assert_allclose(given["error"], ((said - target) ** 2).mean((1, 2, 3)), rtol=2e-5)
    with pytest.raises(ValueError, match="empty prompt"):
        measure(partial(tiny_model.predict, params), inputs, process_of("velocity"), ("error",))


def test_no_gradient_flows_into_the_inputs():
    inputs = noised_inputs(
        **dict(zip(("clean", "noise", "times", "condition"), float32(*images((3, 4))))), process=process_of("noise")
    )

    def total(arrays):
        made = inputs._replace(**arrays)
        return measure(partial(tiny_model.predict, tiny_model.variables()), made, process_of("noise"), ("error",))[
            "error"
        ].sum()

    arrays = {name: getattr(inputs, name) for name in ("latents", "target", "condition", "times")}
    for name, gradient in jax.grad(total)(arrays).items():
        np.testing.assert_array_equal(gradient, 0, err_msg=name)


def test_statistics_that_are_not_there_are_refused():
    model = partial(tiny_model.predict, tiny_model.variables())
    with pytest.raises(ValueError, match="error_map"):
        measure(model, trajectory(2), process_of("noise"), ("error", "error_map"))
    with pytest.raises(ValueError, match="median"):
        measure(model, trajectory(2)._replace(weights=None), process_of("noise"), ("median",))
