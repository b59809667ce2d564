"""Diffusion-NPO and Self-NPO: exchanged pairs, composed parameters, rollouts and re-noising, guidance that learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_mode_model as world
from exact_models import gaussian_flow, gaussian_model

from dpo_jax.diffusion.errors import measure
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.diffusion_npo import compose_negative, diffusion_npo_loss
from dpo_jax.diffusion.methods.self_npo import (
    noise_further,
    self_npo_inputs,
    self_npo_loss,
    self_npo_velocity_loss,
    truncated_rollout,
)
from dpo_jax.diffusion.process import Process, level_of
from dpo_jax.diffusion.sampler import combine_guidance
from dpo_jax.diffusion.schedule import predicts_flow, predicts_noise, predicts_velocity, scaled_linear_schedule
from dpo_jax.worlds import two_modes

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SD = scaled_linear_schedule()
KEY = jax.random.key(0)
NAMES = [f"{model}_{side}_error" for model in ("policy", "reference") for side in ("chosen", "rejected")]


def pair_errors(seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.gamma(4.0, 0.1, 6), jnp.float32) for name in NAMES}


# Diffusion-NPO


def test_exchanged_loss_is_softplus_of_the_margin():
    errors = pair_errors()
    a = {name: np.asarray(x, np.float64) for name, x in errors.items()}
    z = 5.0 * (
        a["reference_chosen_error"] - a["policy_chosen_error"]
        - a["reference_rejected_error"] + a["policy_rejected_error"]
    )  # fmt: skip
    output = diffusion_npo_loss(**errors, beta=10.0)
    np.testing.assert_allclose(output.loss, np.logaddexp(0, z), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["margin"], z, atol=1e-5)
    positive = diffusion_dpo_loss(**errors, beta=10.0)
    np.testing.assert_allclose(output.loss - positive.loss, z, atol=1e-5)
    gradient = jax.grad(lambda e: diffusion_npo_loss(**e, beta=10.0).loss.sum())(errors)
    slope = 5.0 / (1 + np.exp(-z))
    np.testing.assert_allclose(gradient["policy_chosen_error"], -slope, rtol=1e-4)
    np.testing.assert_allclose(gradient["policy_rejected_error"], slope, rtol=1e-4)


def test_exchanged_loss_is_diffusion_dpo_of_exchanged_arguments():
    errors = pair_errors()
    other = {"chosen": "rejected", "rejected": "chosen"}
    exchanged = {name.replace(s, other[s]): x for name, x in errors.items() for s in [name.split("_")[1]]}
    np.testing.assert_allclose(
        diffusion_npo_loss(**errors, beta=10.0).loss, diffusion_dpo_loss(**exchanged, beta=10.0).loss, rtol=1e-6
    )


def test_gradients_at_the_reference_are_opposite():
    errors = pair_errors()
    for side in ("chosen", "rejected"):
        errors[f"policy_{side}_error"] = errors[f"reference_{side}_error"]
    one, two = (
        jax.grad(lambda e, f=f: f(**e, beta=10.0).loss.sum())(errors) for f in (diffusion_npo_loss, diffusion_dpo_loss)
    )
    for name in NAMES:
        np.testing.assert_allclose(one[name], -two[name], atol=1e-6)


def test_parameters_of_the_negative_branch():
    rng = np.random.default_rng(0)
    base, positive, negative = ({"a": jnp.asarray(x[0]), "b": [jnp.asarray(x[1])]} for x in rng.normal(size=(3, 2, 4)))

    def close(given, wanted):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), given, wanted)

    close(compose_negative(base, negative=negative), negative)
    close(compose_negative(base, negative=base, positive=positive), positive)
    close(compose_negative(base, negative=base, positive=positive, alpha=0.0), base)
    close(
        compose_negative(base, negative=negative, positive=positive),
        jax.tree.map(lambda b, p, n: p + n - b, base, positive, negative),
    )
    merge = 0.3  # the published rule: (m base + (1 - m) positive) + delta
    close(
        compose_negative(base, negative=negative, positive=positive, alpha=1 - merge),
        jax.tree.map(lambda b, p, n: merge * b + (1 - merge) * p + n - b, base, positive, negative),
    )


def test_guidance_pushes_away_from_the_negative_branch():
    """d guided / d negative = 1 - scale: what makes the guided prediction better makes the negative branch worse."""
    positive, negative = jax.random.normal(KEY, (2, 5, 3))
    for scale in (0.0, 1.0, 7.5):
        slopes = jax.grad(lambda p, n, s=scale: combine_guidance(p, n, s).sum(), argnums=(0, 1))(positive, negative)
        np.testing.assert_allclose(slopes[0], scale, rtol=1e-6)
        np.testing.assert_allclose(slopes[1], 1 - scale, rtol=1e-6)
        np.testing.assert_allclose(combine_guidance(positive, positive, scale), positive, atol=1e-5)


# Self-NPO


@pytest.mark.parametrize("kind", ["noise", "velocity", "flow"])
def test_the_huber_loss_is_that_of_clean_latents_in_float64(kind):
    rng = np.random.default_rng(1)
    pred, target = rng.normal(size=(2, 4, 3, 2))
    abar = np.array([0.9, 0.5, 0.1, 0.01])
    alpha, sigma = (np.sqrt(abar), np.sqrt(1 - abar)) if kind != "flow" else (1 - abar, abar)
    if kind == "noise":
        factor = sigma / alpha
    else:  # x_0 = alpha x - sigma v, or x - sigma v
        factor = sigma
    error = factor[:, None, None] * (pred - target)
    wanted = (np.sqrt(error**2 + 0.05**2) - 0.05).mean((1, 2))
    arrays = dict(
        policy_image_pred=pred,
        image_target=target,
        sigmas=sigma,
        **({"alphas_cumprod": abar} if kind == "noise" else {}),
    )
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    loss = self_npo_loss if kind == "noise" else self_npo_velocity_loss
    output = loss(**arrays, huber=0.05)
    np.testing.assert_allclose(output.loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["clean_error"], (error**2).mean((1, 2)), rtol=1e-5)
    gradient = jax.grad(lambda a: loss(**a, huber=0.05).loss.sum())(arrays)
    slope = error / np.sqrt(error**2 + 0.05**2) * factor[:, None, None] / 6
    np.testing.assert_allclose(gradient.pop("policy_image_pred"), slope, rtol=1e-4, atol=1e-7)
    assert all(np.all(x == 0) for x in gradient.values())


def test_small_errors_are_squared_and_large_ones_absolute():
    def loss(error):
        ones, half = jnp.ones((1, 1)), jnp.array([0.5])
        given = dict(policy_image_pred=error * ones, image_target=0 * ones, alphas_cumprod=half, sigmas=half**0.5)
        return float(self_npo_loss(**given).loss[0])

    assert loss(1e-6) == pytest.approx(1e-12 / 2e-3, rel=1e-4)
    assert loss(1e4) == pytest.approx(1e4 - 1e-3, rel=1e-6)
    with pytest.raises(ValueError, match="huber"):
        self_npo_loss(
            policy_image_pred=jnp.ones((1, 1)),
            image_target=jnp.ones((1, 1)),
            alphas_cumprod=jnp.ones(1),
            sigmas=jnp.ones(1),
            huber=0.0,
        )


@pytest.mark.parametrize("process", [Process(predicts_noise, SD), Process(predicts_flow)], ids=["schedule", "flow"])
def test_noising_further_has_the_marginal_of_the_noisier_level(process):
    count = 40_000
    here, after = (level_of(process, jnp.full(count, t)) for t in (300.0, 700.0))
    keys = jax.random.split(KEY, 2)
    first, second = (jax.random.normal(key, (count, 1)) for key in keys)
    clean = 0.8
    latents = here.alpha[:, None] * clean + here.sigma[:, None] * first
    moved = np.asarray(noise_further(latents, second, here, after))
    error = 5 / np.sqrt(count)
    assert abs(moved.mean() - float(after.alpha[0]) * clean) < error
    assert abs(moved.std() - float(after.sigma[0])) < error
    np.testing.assert_allclose(noise_further(latents, second, here, here), latents, atol=2e-3)
    ratio = [np.asarray(level.sigma / level.alpha, np.float64)[:, None] for level in (here, after)]
    scaled = latents / here.alpha[:, None] + np.sqrt(ratio[1] ** 2 - ratio[0] ** 2) * second
    np.testing.assert_allclose(moved, scaled * after.alpha[:, None], atol=1e-4)


PROCESSES = {
    "noise": Process(predicts_noise, SD, empty=jnp.zeros(1)),
    "velocity": Process(predicts_velocity, SD, empty=jnp.zeros(1)),
    "flow": Process(predicts_flow, empty=jnp.zeros(1)),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_rollout_follows_the_flow_and_stops_at_timestep_zero(name):
    process = PROCESSES[name]
    exact = gaussian_model(process.schedule, process.parameterisation)
    start = 1000.0 if name == "flow" else 999.0
    times = jnp.array([start, start - 600, 2.0])
    latents = jax.random.normal(KEY, (3, 4))

    @jit
    def run(latents, times):
        return truncated_rollout(exact, latents, times, None, process, steps=250, stride=2.0)

    end, reached, said = run(latents, times)
    np.testing.assert_array_equal(reached, [start - 500, 0, 0])
    for row in range(2):
        levels = [[float(x) for x in level_of(process, jnp.asarray(t))] for t in (times[row], reached[row])]
        np.testing.assert_allclose(end[row], gaussian_flow(latents[row], *levels), atol=0.02)
    np.testing.assert_allclose(end[1], said.clean[1], atol=0.05)  # nearly clean there
    stopped = truncated_rollout(exact, latents, times, None, process, steps=0, stride=2.0)
    np.testing.assert_array_equal(stopped[0], latents)


def data(rows=600):
    keys = jax.random.split(KEY, 2)
    clean = 0.6 + 0.4 * jax.random.normal(keys[0], (rows, 2))
    return dict(clean=clean, own_noise=jax.random.normal(keys[1], (rows, 2)), condition=jnp.ones(rows))


@pytest.mark.parametrize("name", PROCESSES)
def test_inputs_are_noisier_than_their_rollout_and_right_for_a_point_mass(name):
    """A perfect model of one point estimates it everywhere: the target is its prediction, and the error is zero."""
    process = PROCESSES[name]
    exact = gaussian_model(process.schedule, process.parameterisation, mean=0.6, spread=1e-3)
    given = data() | {"clean": jnp.full((600, 2), 0.6)}
    times = jnp.linspace(1.0, 999.0, 600)
    inputs = self_npo_inputs(**given, times=times, process=process, reference=exact, key=KEY)
    error = measure(exact, inputs, process, ("error",))["error"]
    # The implied noise divides float32's rounding and the point's width by sigma.
    np.testing.assert_allclose(np.where(np.asarray(inputs.times) > 50, error, 0), 0, atol=2e-3)
    least = np.maximum(np.floor(np.asarray(times) / 40) * 40 - 161, 0)
    assert np.all(np.asarray(inputs.times) > least) and inputs.times.max() <= 1000
    if process.schedule is not None:
        assert np.array_equal(inputs.times, np.floor(inputs.times)) and inputs.times.max() >= 990


def test_rollouts_are_without_the_prompt_unless_guided():
    asked = {}

    def model(latents, times, condition):
        asked[condition.shape] = True
        return latents * (0.5 + 0.1 * condition[:, None])

    given = data(8) | dict(
        times=jnp.full(8, 500.0), process=PROCESSES["noise"], reference=model, key=KEY, rollout_steps=2
    )
    without, told, strong = (self_npo_inputs(**given, guidance=g) for g in (0.0, 1.0, 0.5))
    blind = self_npo_inputs(**{**given, "condition": jnp.zeros(8)}, guidance=1.0)
    np.testing.assert_allclose(without.latents, blind.latents, atol=1e-6)
    assert float(jnp.abs(told.latents - without.latents).max()) > 1e-2
    assert float(jnp.abs(strong.latents - without.latents).max()) > 1e-3
    np.testing.assert_array_equal(without.condition, 1)  # the student is told the prompt
    assert set(asked) == {(8,), (16,)}


def test_without_steps_the_reference_distils_itself():
    """K = 0 and no further noise: the target is what the reference predicts at its own level."""
    process, exact = PROCESSES["noise"], gaussian_model(SD, predicts_noise)
    inputs = self_npo_inputs(
        **data(8), times=jnp.full(8, 999.0), process=process, reference=exact, key=KEY, rollout_steps=0
    )
    np.testing.assert_array_equal(inputs.times, 999)
    np.testing.assert_allclose(measure(exact, inputs, process, ("error",))["error"], 0, atol=1e-6)


# Learning


def sloppy():
    """A base that saw a fifth of its points under a random class, and a fifth without one."""
    return world.base_model(dropout=0.2, random_classes=0.2)


@pytest.mark.slow
def test_a_negative_branch_that_learnt_the_rejected_images_improves_guidance():
    """The negative branch is asked without the class, so that is what it is trained on."""
    base, pairs = sloppy(), two_modes.make_pairs(10_000, 1)
    rows = world.rows_of([pairs.chosen, pairs.rejected], np.full(10_000, world.EMPTY))
    for seed in (0, 1):
        negative = world.train(diffusion_npo_loss, rows, steps=100, beta=20.0, seed=seed, start=base, reference=base)
        plain = world.measures(base, scale=2.0, seed=seed)
        guided = world.measures(base, scale=2.0, seed=seed, negative=negative)
        assert guided.preferred > plain.preferred + 0.1, (plain, guided)
