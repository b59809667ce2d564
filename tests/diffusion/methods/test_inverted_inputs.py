"""InPO and SmPO: losses against float64, weights of scores, inverted inputs against the published loop in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import two_mode_model as world
from exact_models import gaussian_flow, gaussian_model

from dpo_jax.diffusion.errors import inversion_steps, inverted_inputs, noised_inputs
from dpo_jax.diffusion.inversion import fixed_point, fresh_noise
from dpo_jax.diffusion.methods.ddim_inpo import inpo_inputs, inpo_loss, inpo_policy_inputs
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.smpo import SCORE_MAX, SCORE_MIN, smoothed_weight, smpo_inputs, smpo_loss
from dpo_jax.diffusion.process import Process, level_of
from dpo_jax.diffusion.schedule import predicts_flow, predicts_noise, scaled_linear_schedule
from dpo_jax.worlds import two_modes

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SD = scaled_linear_schedule()
PROCESS = Process(predicts_noise, SD)
TIMES = np.array([0.0, 1, 2, 101, 102, 500, 902, 999])
N = len(TIMES)
KEY = jax.random.key(0)


def pair_errors(rows=7, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"{model}_{side}_error" for model in ("policy", "reference") for side in ("chosen", "rejected")]
    return {name: rng.gamma(4.0, 0.1, rows) for name in names}


def float32(arrays):
    return {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


@pytest.mark.parametrize("beta", [2.0, 50.0])
def test_losses_and_gradients_are_those_of_float64(beta):
    """d loss / d error of the chosen image = sigmoid(-z) w beta / 2, and the opposite at the rejected one."""
    errors, rng = pair_errors(), np.random.default_rng(1)
    scores = {name: rng.uniform(-1, 3, 7) for name in ("chosen_score", "rejected_score")}
    smoothed = dict(gamma=3.0, score_min=-1.0, score_max=3.0)
    gap = (scores["chosen_score"] - scores["rejected_score"]) / 4
    margin = errors["reference_chosen_error"] - errors["policy_chosen_error"]
    margin = margin - errors["reference_rejected_error"] + errors["policy_rejected_error"]
    for weight, loss, extra, options in (
        (np.ones(7), inpo_loss, {}, {}),
        (3 * (2 * sigmoid(gap) - 1), smpo_loss, scores, smoothed),
    ):
        z = 0.5 * beta * weight * margin
        arrays = float32(errors | extra)

        def total(arrays, loss=loss, options=options):
            return loss(**arrays, beta=beta, **options).loss.sum()

        output = loss(**arrays, beta=beta, **options)
        np.testing.assert_allclose(output.loss, np.logaddexp(0, -z), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(output.metrics["margin"], z, rtol=2e-4, atol=2e-5)
        gradient = jax.grad(total)(arrays)
        slope = sigmoid(-z) * 0.5 * beta * weight
        np.testing.assert_allclose(gradient.pop("policy_chosen_error"), slope, rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(gradient.pop("policy_rejected_error"), -slope, rtol=2e-4, atol=1e-6)
        assert all(np.all(value == 0) for value in gradient.values())


def test_reductions_to_diffusion_dpo():
    errors = float32(pair_errors())
    wanted = diffusion_dpo_loss(**errors, beta=30.0)
    np.testing.assert_array_equal(inpo_loss(**errors, beta=30.0).loss, wanted.loss)
    # The gap whose weight is one at gamma 10: 2 artanh(1 / 10).
    scores = float32({"chosen_score": np.full(7, 2 * np.arctanh(0.1)), "rejected_score": np.zeros(7)})
    given = smpo_loss(**errors, **scores, beta=30.0, score_min=0.0, score_max=1.0)
    np.testing.assert_allclose(given.loss, wanted.loss, rtol=1e-5)


def test_equal_scores_give_log_two_and_no_gradient():
    errors = float32(pair_errors())
    same = jnp.full(7, 0.2)
    value, gradient = jax.value_and_grad(lambda e: smpo_loss(**e, chosen_score=same, rejected_score=same).loss.sum())(
        errors
    )
    assert float(value) == pytest.approx(7 * np.log(2), rel=1e-6)
    assert all(np.all(leaf == 0) for leaf in gradient.values())


def test_the_weight_is_odd_rising_and_bounded():
    gap = np.linspace(-1, 1, 41) * (SCORE_MAX - SCORE_MIN)
    low = np.full(41, 0.2)
    weight = smoothed_weight(chosen_score=jnp.asarray(low + gap), rejected_score=jnp.asarray(low))
    np.testing.assert_allclose(weight, -weight[::-1], atol=2e-5)
    assert np.all(np.diff(weight) > 0)
    np.testing.assert_allclose(np.abs(weight).max(), 10 * np.tanh(0.5), rtol=1e-5)
    doubled = smoothed_weight(chosen_score=jnp.asarray(low + gap), rejected_score=jnp.asarray(low), gamma=20.0)
    np.testing.assert_allclose(doubled, 2 * weight, rtol=1e-6)


def test_a_pair_turned_round_with_its_scores_is_the_same_pair():
    errors = float32(pair_errors())
    turned = dict(errors)
    for model in ("policy", "reference"):
        turned[f"{model}_chosen_error"] = errors[f"{model}_rejected_error"]
        turned[f"{model}_rejected_error"] = errors[f"{model}_chosen_error"]
    high, low = jnp.full(7, 0.25), jnp.full(7, 0.15)
    np.testing.assert_allclose(
        smpo_loss(**turned, chosen_score=low, rejected_score=high, beta=20.0).loss,
        smpo_loss(**errors, chosen_score=high, rejected_score=low, beta=20.0).loss,
        rtol=1e-6,
    )


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"gamma": -1.0}, {"score_min": 2.0}, {"beta": float("nan")}])
def test_bad_options_are_refused(options):
    errors = float32(pair_errors())
    with pytest.raises(ValueError, match="finite number above 0"):
        smpo_loss(**errors, chosen_score=jnp.ones(7), rejected_score=jnp.ones(7), **options)


# Inputs


def model(latents, times, condition):
    return jnp.sin(1.3 * latents + times[:, None] / 300) + condition


def numpy_model(latents, times, condition):
    return np.sin(1.3 * latents + times[:, None] / 300) + condition


def points():
    rng = np.random.default_rng(3)
    return rng.normal(size=(2, N, 3))


def published_loop(clean, condition, steps, calls, noise=None):
    """The papers' loop, an image at a time in float64: (latents, last grid level or 0)."""
    table, stride = SD.alphas_cumprod, 1000 // steps
    found, last = clean.copy(), np.zeros(N)
    for row, t in enumerate(TIMES):
        x, c = clean[row : row + 1], condition[row : row + 1]
        for k in range(steps):
            s = k * stride + 1
            if s >= t:
                break
            here, after = table[max(s - stride, 0)], table[s]

            def move(e, x=x, here=here, after=after):
                return np.sqrt(after / here) * (x - np.sqrt(1 - here) * e) + np.sqrt(1 - after) * e

            said, y = [], x
            for _ in range(calls):
                said.append(numpy_model(y, np.array([s]), c))
                y = move(said[-1])
            x, last[row] = move(np.mean(said, axis=0)), s
        found[row] = x[0]
    return found, last


@pytest.mark.parametrize("snap", [False, True])
@pytest.mark.parametrize("steps, calls", [(10, 1), (10, 2), (5, 2)])
def test_inputs_are_those_of_the_published_loop(steps, calls, snap):
    clean, condition = points()
    latents, last = published_loop(clean, condition, steps, calls)
    given = jit(
        lambda x, t, c: smpo_inputs(
            clean=x,
            times=t,
            condition=c,
            process=PROCESS,
            reference=model,
            inversion_steps=steps,
            calls=calls,
            snap=snap,
        )
    )(*(jnp.asarray(v, jnp.float32) for v in (clean, TIMES, condition)))
    times = last if snap else TIMES
    np.testing.assert_array_equal(given.times, times)
    np.testing.assert_allclose(given.latents, latents, atol=2e-4)
    abar = SD.alphas_cumprod[times.astype(int)][:, None]
    noise = (latents - np.sqrt(abar) * clean) / np.sqrt(1 - abar)
    # Near clean latents the implied noise divides float32's rounding by sigma: 0.03 at timestep 0.
    np.testing.assert_allclose(given.target, noise, atol=1e-3)
    assert len({*last}) > 3 and np.array_equal(last == 0, TIMES <= 1)


def test_images_below_the_grid_stay_clean():
    clean, condition = points()
    given = smpo_inputs(
        clean=jnp.asarray(clean, jnp.float32),
        times=jnp.asarray(TIMES, jnp.float32),
        condition=jnp.asarray(condition, jnp.float32),
        process=PROCESS,
        reference=model,
        snap=False,
    )
    abar = SD.alphas_cumprod[:2][:, None]
    np.testing.assert_array_equal(given.latents[:2], np.asarray(clean[:2], np.float32))
    np.testing.assert_allclose(given.target[:2], clean[:2] * (1 - np.sqrt(abar)) / np.sqrt(1 - abar), atol=1e-4)


def test_rows_do_not_know_each_others_timesteps():
    clean, condition = (jnp.asarray(x, jnp.float32) for x in points())
    make = jit(
        lambda x, t, c: inpo_inputs(
            clean=x, times=t, condition=c, process=PROCESS, reference=model, key=KEY, eta=0.0, snap=False
        )
    )
    times = jnp.asarray(TIMES, jnp.float32)
    whole, order = make(clean, times, condition), np.random.default_rng(0).permutation(N)
    permuted = make(clean[order], times[order], condition[order])
    np.testing.assert_allclose(permuted.latents, whole.latents[order], atol=1e-6)
    np.testing.assert_allclose(permuted.target, whole.target[order], atol=1e-5)


def test_fresh_noise_is_added_at_the_levels_below_the_timestep_and_to_each_image_alone():
    rows = 4000
    times = jnp.asarray(np.tile([1.0, 150.0, 999.0], rows)[: 3 * rows])
    flat = jnp.zeros((3 * rows, 1))

    def silent(latents, times, condition):
        return jnp.zeros_like(latents)

    def make(eta, key):
        given = dict(clean=flat, times=times, condition=None, process=PROCESS, reference=silent, snap=False)
        return np.asarray(inpo_inputs(**given, key=key, eta=eta).latents).reshape(-1, 3)

    one, two = make(0.0, KEY), make(0.0, jax.random.key(1))
    np.testing.assert_array_equal(one, two)  # without noise the key is not read
    noisy = make(1.0, KEY)
    np.testing.assert_array_equal(noisy[:, 0], 0)
    # Clean zeros and a silent model: each step shrinks what is there by sqrt(after / here), then adds its noise.
    table = inversion_steps(PROCESS, 10)
    deviations = fresh_noise(SD, np.asarray(table.time, int), eta=1.0)[::-1]
    variances, variance = [], 0.0
    for s, deviation in zip(np.asarray(table.time, int)[::-1], deviations):
        here, after = SD.alphas_cumprod[max(s - 100, 0)], SD.alphas_cumprod[s]
        variance = variance * after / here + deviation**2
        variances.append(variance)
    np.testing.assert_allclose(noisy[:, 1].var(), variances[1], rtol=0.12)
    np.testing.assert_allclose(noisy[:, 2].var(), variances[-1], rtol=0.12)
    assert abs(np.corrcoef(noisy[:, 1], noisy[:, 2])[0, 1]) < 0.08
    with pytest.raises(ValueError, match="eta"):
        inpo_inputs(
            clean=flat, times=times, condition=None, process=Process(predicts_flow), reference=silent, key=KEY, eta=0.1
        )


@pytest.mark.parametrize("process", [PROCESS, Process(predicts_flow, shift=3.0)], ids=["schedule", "flow"])
def test_many_steps_follow_the_models_probability_flow(process):
    """Gaussian data: latents keep their quantile. The noise that they stand for is not what the model predicts there,
    unless the flow is straight: a mean over what might have been is not the one image that was."""
    exact = gaussian_model(process.schedule, process.parameterisation)
    clean = jnp.asarray(points()[0] * 0.4 + 0.6, jnp.float32)

    @jit
    def run(clean):
        return inverted_inputs(
            exact,
            clean=clean,
            times=jnp.full(N, 801.0),
            condition=None,
            process=process,
            steps=200,
            weights=fixed_point(2),
        )

    inputs = run(clean)
    assert 780 < float(inputs.times[0]) < 801
    level = level_of(process, inputs.times[:1])
    wanted = gaussian_flow(clean, (1.0, 0.0), [float(x[0]) for x in level])
    start = level_of(process, jnp.zeros(1))
    wanted = wanted if process.schedule is None else gaussian_flow(clean, start, [float(x[0]) for x in level])
    np.testing.assert_allclose(inputs.latents, wanted, rtol=0.03, atol=0.02)  # first order in the step
    assert float(jnp.abs(exact(inputs.latents, inputs.times, None) - inputs.target).max()) > 0.1


def test_the_published_inputs_ask_the_policy():
    clean, condition = (jnp.asarray(x, jnp.float32) for x in points())
    given = dict(clean=clean, times=jnp.asarray(TIMES, jnp.float32), condition=condition, process=PROCESS)
    by_policy = inpo_policy_inputs(**given, policy=model, key=KEY, eta=0.0)
    by_reference = inpo_inputs(**given, reference=model, key=KEY, eta=0.0, snap=False)
    np.testing.assert_array_equal(by_policy.latents, by_reference.latents)


# Learning


@pytest.mark.slow
def test_inversion_by_the_reference_learns_faster_than_added_noise():
    rows = world.pairs_of(two_modes.make_pairs(10_000, 1))
    gains = []
    for seed in (0, 1):
        plain = world.train(diffusion_dpo_loss, rows, steps=60, beta=100.0, seed=seed)
        inverted = world.train(inpo_loss, rows, steps=60, beta=100.0, seed=seed, inputs=inpo_inputs)
        gains.append(world.measures(inverted).preferred - world.measures(plain).preferred)
    assert min(gains) > 0.03, gains


@pytest.mark.slow
def test_inversion_by_the_reference_stays_on_the_data_where_added_noise_leaves_it():
    base, rows = world.base_model(schedule=SD), world.pairs_of(two_modes.make_pairs(4000, 1))

    def measures(loss, **options):
        def run(seed):
            return world.train(loss, rows, beta=20.0, seed=seed, reference=base, process=PROCESS, **options)

        both = jax.vmap(run)(jnp.arange(2))
        return [world.measures(jax.tree.map(lambda leaf, i=i: leaf[i], both), schedule=SD) for i in range(2)]

    for plain, inverted in zip(measures(diffusion_dpo_loss), measures(inpo_loss, inputs=inpo_inputs)):
        assert min(plain.preferred, inverted.preferred) > 0.95
        assert inverted.on_manifold > plain.on_manifold + 0.4, (plain, inverted)


@pytest.mark.slow
def test_smoothed_weights_beat_noisy_labels():
    pairs = two_modes.make_noisy_pairs(10_000, 1)
    hard = world.pairs_of(pairs)
    swap = pairs.chosen_reward < pairs.rejected_reward
    chosen = np.where(swap[:, None], pairs.rejected, pairs.chosen)
    rejected = np.where(swap[:, None], pairs.chosen, pairs.rejected)
    scores = np.sort([pairs.chosen_reward, pairs.rejected_reward], axis=0)
    soft = world.rows_of([chosen, rejected], pairs.classes, chosen_score=scores[1], rejected_score=scores[0])
    options = dict(gamma=2.0, score_min=0.0, score_max=1.0)
    for seed in (0, 1):
        noisy = world.measures(world.train(diffusion_dpo_loss, hard, steps=150, beta=100.0, seed=seed))
        smooth, full = (
            world.measures(world.train(smpo_loss, soft, steps=150, beta=100.0, seed=seed, inputs=inputs, **options))
            for inputs in (noised_inputs, smpo_inputs)
        )
        assert smooth.preferred > noisy.preferred + 0.1 and full.preferred > noisy.preferred + 0.1
        assert full.on_manifold > noisy.on_manifold - 0.1
