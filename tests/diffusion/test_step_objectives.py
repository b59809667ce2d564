"""Objectives of recorded steps against float64 NumPy: DDIM and flow SDE, guided or not, K trajectories in a row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import gaussian_model

from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.sampler import Guidance, guided, sample, trajectory_logps, trajectory_means
from dpo_jax.diffusion.schedule import linear_schedule, predicts_flow, predicts_noise
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.trajectories import single_steps, trajectory_rows
from dpo_jax.diffusion.transitions import ddim_steps, ddpm_steps, flow_noise_scales, flow_sde_steps, take_steps
from dpo_jax.diffusion.types import TrajectoryBatch
from dpo_jax.ops import logistic_loss
from dpo_jax.types import Array, LossOutput

B, S = 3, 4
SHAPE = (2, 3)
SCHEDULE = linear_schedule()
GRID = np.array([900, 600, 300, 1])
SIGMAS = np.array([0.95, 0.7, 0.4, 0.2, 0.05])
DIFFUSION = Process(predicts_noise, SCHEDULE)
FLOW = Process(predicts_flow)


def make_steps(kind):
    if kind == "ddim":
        return ddim_steps(SCHEDULE, GRID, eta=1.0)
    return flow_sde_steps(SIGMAS, flow_noise_scales(SIGMAS))


PROCESSES = {"ddim": DIFFUSION, "flow": FLOW}


def network(weight):
    """Predicts tanh(weight x + condition + time / 1000), elementwise."""

    def predict(latents, times, condition):
        told = condition + times / 1000
        return jnp.tanh(weight * latents + told.reshape(-1, *[1] * (latents.ndim - 1)))

    return predict


def numpy_said(weight, x, time, condition, scale):
    """The same, guided by condition = (positive, negative), in float64."""
    positive, negative = (np.tanh(weight * x + c + time / 1000) for c in condition)
    return negative + scale * (positive - negative)


def numpy_step(kind, index, x, said) -> tuple[Any, Any]:
    """Mean and deviation of one step by the papers' formulas."""
    if kind == "ddim":
        table = np.append(SCHEDULE.alphas_cumprod[GRID], SCHEDULE.alphas_cumprod[0])
        here, after = table[index], table[index + 1]
        clean = (x - np.sqrt(1 - here) * said) / np.sqrt(here)
        variance = (1 - after) / (1 - here) * (1 - here / after)
        return np.sqrt(after) * clean + np.sqrt(1 - after - variance) * said, np.sqrt(variance)
    s, dt = SIGMAS[index], SIGMAS[index + 1] - SIGMAS[index]
    k = 0.7 * np.sqrt(s / (1 - s))
    return x * (1 + k**2 / (2 * s) * dt) + said * (1 + k**2 * (1 - s) / (2 * s)) * dt, k * np.sqrt(-dt)


def random_batch(kind, images, *, scale=1.0, seed=0, columns=None):
    """Rows of states that no model made, each row with its own order of steps."""
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(S) for _ in range(B)])  # [B, S] steps of the table
    steps = jax.tree.map(lambda table: table[index], make_steps(kind))
    latents = rng.normal(size=(B, images, S + 1, *SHAPE)).astype(np.float32)
    told = rng.normal(size=(2, B, images)).astype(np.float32)
    condition = told[0] if scale == 1 else Guidance(told[0], told[1])
    return TrajectoryBatch(latents, steps, condition, np.ones(B, np.float32), columns or {}), index, told


def numpy_values(kind, weight, batch, index, told, scale=1.0):
    """Means [B, K, S, ...], deviations [B, S] and log-probabilities per element [B, K, S], float64."""
    latents = np.asarray(batch.latents, np.float64)
    means, stds = np.zeros((*latents.shape[:2], S, *SHAPE)), np.zeros((B, S))
    times = np.asarray(make_steps(kind).time, np.float64)
    for b, k, s in np.ndindex(*latents.shape[:2], S):
        said = numpy_said(weight, latents[b, k, s], times[index[b, s]], np.float64(told[:, b, k]), scale)
        means[b, k, s], stds[b, s] = numpy_step(kind, index[b, s], latents[b, k, s], said)
    z = (latents[:, :, 1:] - means) / stds[:, None, :, None, None]
    density = -0.5 * z**2 - np.log(stds[:, None, :, None, None]) - 0.5 * np.log(2 * np.pi)
    return means, stds, density.mean((-2, -1))


def capture(names):
    """A loss of these arguments that hands them out as metrics."""
    scope = {"LossOutput": LossOutput, "Array": Array, "jnp": jnp}
    kept = ", ".join(f"'{name}': {name}" for name in names)
    exec(f"def loss(*, {', '.join(names)}): return LossOutput(jnp.zeros({names[0]}.shape[0]), {{{kept}}})", scope)
    return scope["loss"]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["ddim", "flow"])
@pytest.mark.parametrize("images", [1, 2])
def test_what_losses_are_given_is_what_the_formulas_say(kind, images, scale):
    batch, index, told = random_batch(kind, images, scale=scale)
    means, stds, logps = numpy_values(kind, 0.5, batch, index, told, scale)
    others, _, other_logps = numpy_values(kind, 0.4, batch, index, told, scale)
    gap = np.square(means - others).mean((-2, -1))
    sides = [("", slice(None))] if images == 1 else [("chosen_", 0), ("rejected_", 1)]
    names = [f"{of}_{side}step_logps" for of in ("policy", "reference") for side, _ in sides]
    names += [f"{side}step_gap" for side, _ in sides] + ["step_stds"]
    objective = from_step_loss(capture(names), PROCESSES[kind], guidance=scale)
    given = jax.jit(lambda batch: objective(network(0.5), network(0.4), batch, jax.random.key(0)).metrics)(batch)
    for side, place in sides:
        for of, expected in (("policy", logps), ("reference", other_logps)):
            expected = expected[:, 0] if images == 1 else expected[:, place]
            np.testing.assert_allclose(given[f"{of}_{side}step_logps"], expected, rtol=1e-4, atol=1e-5)
        expected = gap[:, 0] if images == 1 else gap[:, place]
        np.testing.assert_allclose(given[f"{side}step_gap"], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(given["step_stds"], stds, rtol=1e-5)


def test_trajectories_without_names_are_all_handed_over():
    batch, index, told = random_batch("ddim", 3)
    given = from_step_loss(capture(["policy_step_logps"]), DIFFUSION)(network(0.5), None, batch, jax.random.key(0))
    expected = numpy_values("ddim", 0.5, batch, index, told, 1.0)[2]
    np.testing.assert_allclose(given.metrics["policy_step_logps"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_gradient_in_the_means_is_the_closed_form(kind):
    """d logp / d mean = (x' - mean) / (std^2 elements), by a model whose prediction is a free array."""
    batch, _, _ = random_batch(kind, 1)
    latents = jnp.asarray(batch.latents)[:, 0]
    steps = jax.tree.map(lambda table: jnp.asarray(table).T, batch.steps)
    said = jax.random.normal(jax.random.key(1), (B, *SHAPE))
    loss = from_step_loss(capture(["policy_step_logps"]), PROCESSES[kind])

    def logps(said):
        return loss(lambda x, t, c: said, None, batch, jax.random.key(0)).metrics["policy_step_logps"]

    def means(said):
        return trajectory_means(lambda x, t, c: said, latents, steps, parameterisation=PROCESSES[kind].parameterisation)

    at, pull = jax.vjp(means, said)
    variance = jnp.square(jnp.asarray(batch.steps.std))[..., None, None]
    wanted = (latents[:, 1:] - at) / (variance * np.prod(SHAPE))
    slope = jax.grad(lambda said: logps(said).sum())(said)
    np.testing.assert_allclose(slope, pull(wanted)[0], rtol=1e-4, atol=1e-5 * float(jnp.abs(slope).max()))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_ratios_of_the_policy_that_made_the_rollout_are_one(kind, scale):
    # A deviation of 0.01 turns one rounding of a state into 1e-5 of a ratio of few elements: the last step is wider.
    process, told = PROCESSES[kind], jnp.linspace(-1, 1, B)
    exact = gaussian_model(process.schedule, process.parameterisation)
    grid, last = np.array([999, 700, 400, 100]), SCHEDULE.alphas_cumprod[50]
    steps = make_steps(kind) if kind == "flow" else ddim_steps(SCHEDULE, grid, eta=1.0, last_alpha_cumprod=last)

    def model(latents, times, condition):
        return exact(latents, times, None) + 0.1 * network(0.5)(latents, times, condition)

    condition = told if scale == 1 else Guidance(told, -told)
    start = jax.random.normal(jax.random.key(0), (B, *SHAPE))
    rollout = jax.jit(
        lambda start: (
            sample(
                model if scale == 1 else guided(model, scale),
                start,
                steps,
                condition,
                parameterisation=process.parameterisation,
                key=jax.random.key(1),
                record=(1, S),
            ).trajectory
        )
    )(start)
    batch = trajectory_rows(rollout, take_steps(steps, slice(1, S)), condition)
    objective = from_step_loss(capture(["policy_step_logps", "old_step_logps"]), process, guidance=scale)
    given = jax.jit(lambda batch: objective(model, None, batch, jax.random.key(0)).metrics)(batch)
    ratio = jnp.exp(given["policy_step_logps"] - given["old_step_logps"])
    assert ratio.shape == (B, S - 1)
    np.testing.assert_allclose(ratio, 1.0, atol=1e-6)


def test_deterministic_steps_have_log_probability_zero_and_no_deviation():
    batch, _, _ = random_batch("ddim", 1)
    flat = jax.tree.map(lambda table: np.tile(table, (B, 1)), ddim_steps(SCHEDULE, GRID))
    batch = dataclasses.replace(batch, steps=flat)
    objective = from_step_loss(capture(["policy_step_logps", "step_stds"]), DIFFUSION)
    given = objective(network(0.5), None, batch, jax.random.key(0)).metrics
    np.testing.assert_array_equal(given["policy_step_logps"], np.zeros((B, S)))
    np.testing.assert_array_equal(given["step_stds"], np.zeros((B, S)))


def test_the_last_ddpm_step_drops_out():
    steps = ddpm_steps(SCHEDULE, np.array([500, 0]))
    latents = np.random.default_rng(0).normal(size=(B, 1, 3, *SHAPE)).astype(np.float32)
    tiled = jax.tree.map(lambda table: np.tile(table, (B, 1)), steps)
    batch = TrajectoryBatch(latents, tiled, np.zeros((B, 1), np.float32), np.ones(B, np.float32), {})

    def total(weight):
        objective = from_step_loss(capture(["policy_step_logps"]), DIFFUSION)
        return objective(network(weight), None, batch, jax.random.key(0)).metrics["policy_step_logps"].sum(0)

    slope = jax.jacobian(total)(0.5)
    assert total(0.5)[1] == 0 and slope[1] == 0 and slope[0] != 0


def pair_loss(
    *,
    policy_chosen_step_logps: Array,
    policy_rejected_step_logps: Array,
    reference_chosen_step_logps: Array,
    reference_rejected_step_logps: Array,
) -> LossOutput:
    chosen = policy_chosen_step_logps - reference_chosen_step_logps
    return LossOutput(logistic_loss(chosen - policy_rejected_step_logps + reference_rejected_step_logps).mean(-1), {})


def test_one_state_of_two_next_states_is_asked_once():
    batch, _, _ = random_batch("ddim", 2)
    one = single_steps(dataclasses.replace(batch, condition=batch.condition[:, :1]))
    same = np.array(one.latents)
    same[:, 1, 0] = same[:, 0, 0]
    one = dataclasses.replace(one, latents=same)
    rows = []

    def model(latents, times, condition):
        rows.append(len(latents))
        return network(0.5)(latents, times, condition)

    apart, shared = (
        from_step_loss(pair_loss, DIFFUSION, shared_state=shared)(model, network(0.4), one, jax.random.key(0)).loss
        for shared in (False, True)
    )
    assert max(rows[: len(rows) // 2]) == 2 * B * S and max(rows[len(rows) // 2 :]) == B * S
    np.testing.assert_allclose(shared, apart, rtol=1e-5)
    with pytest.raises(ValueError, match="4 steps do not share"):
        from_step_loss(pair_loss, DIFFUSION, shared_state=True)(model, model, batch, jax.random.key(0))


@pytest.mark.parametrize("images", [1, 2])
def test_single_steps_are_the_steps_of_the_rows(images):
    """The mean of a loss over single steps is its value on whole trajectories."""
    batch, _, _ = random_batch("flow", images, columns={"old_step_logps": np.zeros((B, S), np.float32)})
    name = ["policy_step_logps", "old_step_logps"] if images == 1 else ["policy_rejected_step_logps", "old_step_logps"]
    objective = from_step_loss(capture(name), FLOW)
    old = jnp.asarray(np.random.default_rng(1).normal(size=(B, S)))
    batch = dataclasses.replace(batch, columns={"old_step_logps": old})
    whole = objective(network(0.5), None, batch, jax.random.key(0)).metrics
    single = objective(network(0.5), None, single_steps(batch), jax.random.key(0)).metrics
    for key in name:
        assert single[key].shape == (B * S, 1)
        np.testing.assert_allclose(single[key].reshape(B, S), whole[key], rtol=1e-5, atol=1e-6)


def test_rows_of_rollouts():
    steps = make_steps("ddim")
    start = jax.random.normal(jax.random.key(0), (2 * B, *SHAPE))
    told = jnp.arange(2.0 * B)
    rollout = sample(
        network(0.5), start, steps, told, parameterisation=predicts_noise, key=jax.random.key(1), record=(0, S)
    )
    trajectory = rollout.trajectory
    assert trajectory is not None
    batch = trajectory_rows(trajectory, steps, told, images=2, columns={"advantages": jnp.zeros(B)})
    assert batch.latents.shape == (B, 2, S + 1, *SHAPE) and batch.steps.time.shape == (B, S)
    np.testing.assert_array_equal(batch.condition, told.reshape(B, 2))
    np.testing.assert_array_equal(batch.latents[1, 1], trajectory.latents[3])
    again = trajectory_logps(network(0.5), trajectory.latents, steps, told, parameterisation=predicts_noise)
    elements = np.prod(SHAPE)
    np.testing.assert_allclose(batch.columns["old_step_logps"][1, 1], again[3] / elements, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="6 trajectories are no rows of 4"):
        trajectory_rows(trajectory, steps, told, images=4)


def test_what_is_missing_is_named():
    batch, _, _ = random_batch("ddim", 1, columns={"old_step_logps": np.zeros((B, S), np.float32)})
    model, key = network(0.5), jax.random.key(0)
    with pytest.raises(TypeError, match=r"needs the columns \['advantages'\], and the data has \['old_step_logps'\]"):
        from_step_loss(capture(["policy_step_logps", "old_step_logps", "advantages"]), DIFFUSION)(
            model, None, batch, key
        )
    for name in ("reference_step_logps", "step_gap"):
        with pytest.raises(TypeError, match="needs a reference"):
            from_step_loss(capture([name]), DIFFUSION)(model, None, batch, key)
    with pytest.raises(TypeError, match=r"no option \['beta'\]"):
        from_step_loss(pair_loss, DIFFUSION, beta=1.0)


@pytest.mark.parametrize("images", [1, 3])
def test_a_trajectory_that_is_not_there_is_missed_at_any_number_of_steps(images):
    """Two steps of one trajectory are not two trajectories of one step."""
    batch, _, _ = random_batch("ddim", images)
    two = dataclasses.replace(
        batch, latents=batch.latents[:, :, :3], steps=jax.tree.map(lambda table: table[:, :2], batch.steps)
    )
    with pytest.raises(TypeError, match=f"the rows have {images} images"):
        from_step_loss(pair_loss, DIFFUSION)(network(0.5), network(0.4), two, jax.random.key(0))
