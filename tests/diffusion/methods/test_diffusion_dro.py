"""Diffusion-DRO against float64 NumPy: hinge, inputs, grids, rollouts, the buffer, and turns on the two-mode world."""

import functools

import four_modes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from numeric import central_differences, float32, gradients

from dpo_jax.diffusion.methods import dro_loss
from dpo_jax.diffusion.methods.diffusion_dro import (
    at_steps,
    draw_states,
    dro_inputs,
    dro_rollout,
    empty_buffer,
    perturbed_timesteps,
    push,
    select_experts,
)
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.sampler import dpm_solver_steps
from dpo_jax.diffusion.schedule import (
    leading_timesteps,
    linear_schedule,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
)
from dpo_jax.diffusion.types import DiffusionBatch

B, SCHEDULE = 6, linear_schedule()
NAMES = [f"{of}_{side}_error" for side in ("expert", "sampled") for of in ("policy", "reference")]


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(4.0, 0.1, B) for name in NAMES}


def numpy_dro(a, margin):
    gap = a["policy_expert_error"] - a["reference_expert_error"]
    return np.maximum(0, margin + gap - (a["policy_sampled_error"] - a["reference_sampled_error"]))


@pytest.mark.parametrize("margin", [1e-3, 0.3, 1e3])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(margin, seed):
    inputs, formula = arrays(seed), functools.partial(numpy_dro, margin=margin)
    out = dro_loss(**float32(inputs), margin=margin)
    np.testing.assert_allclose(out.loss, formula(inputs), rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(functools.partial(dro_loss, margin=margin), inputs).items():
        np.testing.assert_allclose(gradient, central_differences(formula, inputs, name), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(out.metrics["active"], formula(inputs) > 0)


def test_a_constant_of_both_errors_of_a_side_cancels():
    inputs = arrays()
    shifted = {name: value + (0.7 if "expert" in name else 0.2) for name, value in inputs.items()}
    np.testing.assert_allclose(dro_loss(**float32(shifted)).loss, dro_loss(**float32(inputs)).loss, atol=1e-6)


def test_a_negative_margin_is_refused():
    with pytest.raises(ValueError, match="margin is -1"):
        dro_loss(**float32(arrays()), margin=-1.0)


def rows(model, process, times):
    """Experts' rows with states at which the given model's own prediction is recorded."""
    rng = np.random.default_rng(0)
    latents, states = (jnp.asarray(rng.normal(size=(B, 4)), jnp.float32) for _ in range(2))
    told = jnp.asarray(rng.normal(size=(B, 4)), jnp.float32)
    columns = {"sampled_latents": states, "sampled_noise": model(states, times, told), "sampled_times": times}
    return DiffusionBatch(latents[:, None], told[:, None], jnp.ones(B), columns)


def test_where_all_three_models_agree_the_loss_is_the_margin_and_the_sampled_half_has_no_gradient():
    process, times = Process(predicts_noise, SCHEDULE), jnp.linspace(50, 900, B).round()
    params = tiny_model.variables()
    model = functools.partial(tiny_model.predict, params)
    batch = rows(model, process, times)
    objective = from_loss(dro_loss, process, inputs=dro_inputs)

    def mean(params, drop=0.0):
        policy = functools.partial(tiny_model.predict, params)
        return objective(policy, model, batch, jax.random.key(0)).loss.mean()

    assert float(mean(params)) == pytest.approx(1e-3, rel=1e-5)
    made = dro_inputs(
        clean=batch.latents[:, 0], own_noise=jnp.ones((B, 4)), condition=batch.condition[:, 0], process=process,
        images=1, **batch.columns,
    )  # fmt: skip
    np.testing.assert_array_equal(made.latents[1::2], batch.columns["sampled_latents"])
    np.testing.assert_array_equal(made.target[1::2], batch.columns["sampled_noise"])
    np.testing.assert_array_equal(made.times, np.repeat(times, 2))
    abar = SCHEDULE.alphas_cumprod[np.asarray(times, int)][:, None]
    noisy = np.sqrt(abar) * np.asarray(batch.latents[:, 0], np.float64) + np.sqrt(1 - abar)
    np.testing.assert_allclose(made.latents[::2], noisy, rtol=1e-5, atol=1e-6)

    def sampled(params):
        said = tiny_model.predict(params, made.latents, made.times, made.condition)
        return jnp.mean(jnp.square(said - made.target)[1::2])

    assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(jax.grad(sampled)(params)))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.grad(mean)(params))) > 1e-4


@pytest.mark.parametrize(("parameterisation", "schedule"), [(predicts_velocity, SCHEDULE), (predicts_flow, None)])
def test_targets_of_other_parameterisations_are_the_models_own_predictions(parameterisation, schedule):
    """A rollout records the noise; the target is again what the model said."""
    process = Process(parameterisation, schedule)
    times = jnp.array([200.0, 500.0, 800.0])
    model = functools.partial(tiny_model.predict, tiny_model.variables())
    x, told = jax.random.normal(jax.random.key(0), (3, 4)), jnp.zeros((3, 4))
    said = model(x, times, told)
    t = np.asarray(times, np.float64)[:, None]
    if schedule is None:
        noise = x + (1 - t / 1000) * said
    else:
        abar = schedule.alphas_cumprod[t.astype(int)]
        noise = np.sqrt(abar) * said + np.sqrt(1 - abar) * x
    made = dro_inputs(
        clean=x, own_noise=x, condition=told, process=process, images=1, sampled_latents=x,
        sampled_noise=jnp.asarray(noise, jnp.float32), sampled_times=times,
    )  # fmt: skip
    np.testing.assert_allclose(made.target[1::2], said, rtol=1e-3, atol=1e-4)


def test_every_row_has_a_grid_of_its_own():
    grid = perturbed_timesteps(jax.random.key(0), steps=20, rows=64)
    assert grid.shape == (20, 64) and grid.min() >= 0 and grid.max() < 1000
    assert (np.diff(grid, axis=0) == -50).all() and len(set(grid[-1])) > 20 and grid[-1].max() < 50
    with pytest.raises(ValueError, match="2000 sampling steps"):
        perturbed_timesteps(jax.random.key(0), steps=2000, rows=2)


def test_states_are_those_before_each_step_with_the_prediction_there():
    grid = perturbed_timesteps(jax.random.key(0), steps=5, rows=3)
    model = functools.partial(tiny_model.predict, tiny_model.variables())
    start, told = jax.random.normal(jax.random.key(1), (3, 4)), jnp.zeros((3, 4))
    states = dro_rollout(model, start, dpm_solver_steps(SCHEDULE, grid), told, parameterisation=predicts_noise)
    np.testing.assert_array_equal(states.latents[:, 0], start)
    np.testing.assert_array_equal(states.times, grid.T)
    for k in range(5):
        said = model(states.latents[:, k], states.times[:, k], told)
        np.testing.assert_allclose(states.noise[:, k], said, rtol=1e-5, atol=1e-6)
    alone = dro_rollout(
        model, start[1:2], dpm_solver_steps(SCHEDULE, grid[:, 1]), told[:1], parameterisation=predicts_noise
    )
    np.testing.assert_allclose(alone.latents[0], states.latents[1], rtol=1e-4, atol=1e-5)
    one = at_steps(states, jnp.array([0, 4, 2]))
    np.testing.assert_array_equal(one.latents[1], states.latents[1, 4])
    assert one.times.tolist() == [grid[0, 0], grid[4, 1], grid[2, 2]]


def test_the_buffer_holds_the_latest_and_draws_from_those_there_are():
    entries = {"x": jnp.arange(10.0)[:, None], "row": jnp.arange(10)}
    take = functools.partial(jax.tree.map, lambda leaf, low=0, high=2: leaf[low:high])
    buffer = empty_buffer(entries, size=4)
    buffer = push(buffer, take(entries))
    drawn = draw_states(buffer, jax.random.key(0), rows=200, steps=3)
    assert set(drawn.entries["row"].tolist()) == {0, 1} and set(drawn.steps.tolist()) == {0, 1, 2}
    for low in (2, 4, 6):
        buffer = jax.jit(push)(buffer, jax.tree.map(lambda leaf, low=low: leaf[low : low + 2], entries))
    assert set(buffer.entries["row"].tolist()) == {4, 5, 6, 7} and buffer.count == 8
    drawn = draw_states(buffer, jax.random.key(1), rows=400, steps=3)
    assert np.bincount(drawn.entries["row"], minlength=8)[4:].min() > 60
    np.testing.assert_array_equal(drawn.entries["x"][:, 0], drawn.entries["row"])
    with pytest.raises(ValueError, match="10 trajectories for a buffer of 4"):
        push(buffer, entries)


def test_experts_are_the_highest_scores():
    assert select_experts(np.array([0.1, 3.0, 2.0, 3.0, -1.0]), top=3).tolist() == [1, 3, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_turns_draw_samples_to_the_experts(seed):
    """On four modes, experts from the first; the policy that draws is the network of the last turn."""
    grid = np.tile(leading_timesteps(8)[:, None], 64)
    steps = dpm_solver_steps(four_modes.SCHEDULE, grid)

    def turn(model, key):
        start, places, experts = jax.random.split(key, 3)
        states = dro_rollout(model, four_modes.noise(start, 64), steps, parameterisation=predicts_noise)
        one = at_steps(states, jax.random.randint(places, (64,), 0, 8))
        clean = four_modes.CENTRES[0] + four_modes.SPREAD * jax.random.normal(experts, (64, 1, 2))
        columns = {"sampled_latents": one.latents, "sampled_noise": one.noise, "sampled_times": one.times}
        return DiffusionBatch(clean, None, jnp.ones(64), columns), four_modes.reward(states.latents[:, -1])

    objective = from_loss(dro_loss, four_modes.DIFFUSION, inputs=dro_inputs, margin=0.1)
    _, rewards = four_modes.learn(objective, turn, turns=200, rate=1e-3, seed=seed)
    # It learns so soon that the mean of the first twenty turns is no start.
    assert rewards[-20:].mean() > rewards[:3].mean() + 5
