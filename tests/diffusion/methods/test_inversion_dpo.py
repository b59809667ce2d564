"""Inversion-DPO: loss against float64, its trajectory against the published loop, the stationary start, the sign."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_mode_model as world

from dpo_jax.diffusion.errors import measure
from dpo_jax.diffusion.methods.inversion_dpo import (
    START_NOISE,
    inversion_dpo_inputs,
    inversion_dpo_loss,
    step_weights,
)
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import (
    convert_prediction,
    level_at,
    predicts_flow,
    predicts_noise,
    predicts_velocity,
    scaled_linear_schedule,
)
from dpo_jax.perturb import perturb
from dpo_jax.worlds import two_modes

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SD = scaled_linear_schedule()
PROCESS = Process(predicts_noise, SD, empty=jnp.full((1, 3), 0.2))
KEY = jax.random.key(0)


@pytest.mark.parametrize("sign", [-1, 1])
def test_loss_and_gradient_are_those_of_float64(sign):
    rng = np.random.default_rng(0)
    chosen, rejected = rng.gamma(2.0, 0.1, (2, 6))
    z = sign * 15.0 * (chosen - rejected)
    given = {"policy_chosen_error": chosen, "policy_rejected_error": rejected}
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in given.items()}
    output = inversion_dpo_loss(**arrays, beta=30.0, sign=sign)
    np.testing.assert_allclose(output.loss, np.logaddexp(0, -z), rtol=1e-5)
    gradient = jax.grad(lambda a: inversion_dpo_loss(**a, beta=30.0, sign=sign).loss.sum())(arrays)
    slope = -sign * 15.0 / (1 + np.exp(z))
    np.testing.assert_allclose(gradient["policy_chosen_error"], slope, rtol=1e-5)
    np.testing.assert_allclose(gradient["policy_rejected_error"], -slope, rtol=1e-5)
    other = inversion_dpo_loss(**arrays, beta=30.0, sign=-sign)
    np.testing.assert_allclose(output.loss - other.loss, -z, atol=1e-5)  # softplus(-z) - softplus(z)
    swapped = inversion_dpo_loss(
        policy_chosen_error=arrays["policy_rejected_error"],
        policy_rejected_error=arrays["policy_chosen_error"],
        beta=30.0,
        sign=sign,
    )
    np.testing.assert_allclose(swapped.metrics["margin"], -z, rtol=1e-4)


@pytest.mark.parametrize("options", [{"sign": 0.0}, {"sign": 2.0}, {"beta": 0.0}])
def test_bad_options_are_refused(options):
    one = jnp.ones(1)
    with pytest.raises(ValueError, match=next(iter(options))):
        inversion_dpo_loss(policy_chosen_error=one, policy_rejected_error=one, **options)


def model(scale):
    def predict(latents, times, condition):
        return jnp.sin(scale * latents + times[:, None] / 300) + condition

    return predict


def numpy_guided(scale, guidance, latents, time, condition):
    told, empty = (np.sin(scale * latents + time / 300) + c for c in (condition, 0.2))
    return empty + guidance * (told - empty)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_weighted_error_is_that_of_the_published_loop(guidance):
    """Grid of offset 0, whose first step stays where it is but counts; weights 1 / (2 abar)."""
    rng = np.random.default_rng(1)
    clean, condition = rng.normal(size=(2, 4, 3))
    steps, z, total = 8, clean, 0.0
    for k in range(steps):
        here, after = SD.alphas_cumprod[max(k - 1, 0) * 125], SD.alphas_cumprod[k * 125]
        reference, policy = (numpy_guided(s, guidance, z, k * 125, condition) for s in (0.9, 1.0))
        total = total + np.mean((policy - reference) ** 2, axis=1) / (2 * after) / steps
        z = np.sqrt(after / here) * (z - np.sqrt(1 - here) * reference) + np.sqrt(1 - after) * reference

    @jit
    def run(clean, condition):
        inputs = inversion_dpo_inputs(
            clean=clean,
            condition=condition,
            process=PROCESS,
            reference=model(0.9),
            trajectory_steps=steps,
            guidance=guidance,
        )
        return measure(model(1.0), inputs, PROCESS, ("error",))["error"], inputs.times, inputs.latents[:2]

    error, times, first = run(jnp.asarray(clean, jnp.float32), jnp.asarray(condition, jnp.float32))
    np.testing.assert_allclose(error, total, rtol=2e-3)
    np.testing.assert_array_equal(times[:, 0], np.arange(steps) * 125)
    np.testing.assert_allclose(first[1], first[0], atol=1e-6)


def test_weights_of_the_steps():
    times = jnp.array([0.0, 500.0, 900.0, 948.0])
    np.testing.assert_allclose(step_weights(PROCESS, times), 0.125 / SD.alphas_cumprod[[0, 500, 900, 948]], rtol=1e-5)
    whole = 4 * np.asarray(step_weights(PROCESS, times))
    np.testing.assert_allclose(whole, [0.5, 1.8, 35, 59], rtol=0.03)  # the figures the paper's weights are known by
    np.testing.assert_allclose(step_weights(Process(predicts_velocity, SD), times), 0.125, rtol=1e-5)
    np.testing.assert_allclose(step_weights(Process(predicts_flow), times), 0.125, rtol=1e-5)


def test_the_divergence_does_not_depend_on_what_the_model_predicts():
    """On one trajectory, the same two models in noise and in velocity have the same weighted error."""
    rng = np.random.default_rng(2)
    clean, condition = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 4, 3)))
    velocity = Process(predicts_velocity, SD)

    def in_velocity(noise, latents, times):
        return convert_prediction(noise, latents, level_at(SD, times), source=predicts_noise, target=predicts_velocity)

    @jit
    def run(clean, condition):
        inputs = inversion_dpo_inputs(
            clean=clean, condition=condition, process=PROCESS, reference=model(0.9), trajectory_steps=8, guidance=1.0
        )
        target = jnp.stack([in_velocity(*point) for point in zip(inputs.target, inputs.latents, inputs.times)])
        weights = jnp.broadcast_to(step_weights(velocity, inputs.times[:, 0])[:, None], inputs.times.shape)

        def other(latents, times, condition):
            return in_velocity(model(1.0)(latents, times, condition), latents, times)

        same = measure(other, inputs._replace(target=target, weights=weights), velocity, ("error",))
        return same["error"], measure(model(1.0), inputs, PROCESS, ("error",))["error"]

    np.testing.assert_allclose(*run(clean, condition), rtol=1e-4)


# One base for all tests: that of the noisier schedule, where the signs part clearly.
TWO_MODES = Process(predicts_noise, SD)


def base_model():
    return world.base_model(schedule=SD)


def two_mode_gradient(start):
    rows = jax.tree.map(lambda leaf: leaf[:32], world.pairs_of(two_modes.make_pairs(100, 0)))
    reference = base_model()
    objective = from_loss(
        inversion_dpo_loss, TWO_MODES, inputs=inversion_dpo_inputs, trajectory_steps=10, guidance=1.0, beta=20.0
    )

    def mean(params, reference):
        models = (partial(world.predict, p) for p in (params, reference))
        return objective(*models, rows, KEY).loss.mean()

    return jit(jax.value_and_grad(mean, argnums=(0, 1)))(start, reference)


def nudged(base, share=START_NOISE, seed=0):
    return perturb(base, jax.random.key(seed), share, trainable=lambda name: True)


def test_the_reference_itself_is_a_stationary_start():
    value, (policy, reference) = two_mode_gradient(base_model())
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves((policy, reference)))
    norms = []
    for share in (1e-4, 1e-3):
        _, (policy, reference) = two_mode_gradient(nudged(base_model(), share))
        norms.append(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(policy))))
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(reference))
    assert norms[0] > 0 and 7 < norms[1] / norms[0] < 13  # linear in the distance


@pytest.mark.slow
def test_the_sign_says_which_mode_is_left(optimised):
    """Of the samples that stay on the data, the default sign keeps the preferred ones and the published one the others.

    Either way many samples leave the data, and the preferred mode gains nothing: this loss wants an early end.
    """
    base, seeds = base_model(), (0, 1)
    rows = world.pairs_of(two_modes.make_pairs(4000, 1))
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nudged(base, seed=seed) for seed in seeds))

    def measures(params):
        return world.measures(params, schedule=SD)

    def trained(sign):
        """Measures of both seeds, trained side by side."""

        def run(seed, start):
            return world.train(
                inversion_dpo_loss,
                rows,
                seed=seed,
                start=start,
                reference=base,
                process=TWO_MODES,
                inputs=inversion_dpo_inputs,
                trajectory_steps=10,
                guidance=1.0,
                beta=20.0,
                sign=sign,
            )

        both = jax.vmap(run)(jnp.asarray(seeds), starts)
        return [measures(jax.tree.map(lambda leaf, i=i: leaf[i], both)) for i in range(len(seeds))]

    before = measures(base).preferred_on_manifold
    ours, published = trained(-1.0), trained(1.0)
    assert all(m.preferred_on_manifold > before + 0.1 for m in ours), (before, ours)
    assert all(m.preferred_on_manifold < before - 0.08 for m in published), (before, published)
    assert all(m.on_other < m.on_preferred for m in ours) and all(m.on_preferred < m.on_other for m in published)
