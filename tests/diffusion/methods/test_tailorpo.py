"""TailorPO against float64 NumPy: the pair's loss, rewards of steps, guidance, and turns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import MEAN, SPREAD, gaussian_model, mixture_model
from four_modes import CENTRES, DIFFUSION, SCHEDULE, STEPS, learn, noise, reward, score
from four_modes import SPREAD as WIDTH
from numeric import central_differences, float32, gradients, softplus
from test_d3po import arrays, log_ratios

from dpo_jax.diffusion.methods import spo_loss, tailorpo_loss
from dpo_jax.diffusion.methods.tailorpo import guide_towards, step_reward, tailorpo_rollout
from dpo_jax.diffusion.pools import pair_rows
from dpo_jax.diffusion.sampler import sample
from dpo_jax.diffusion.schedule import leading_timesteps, predicts_noise
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.transitions import ddim_steps, take_steps


def pairs(spread=0.5):
    inputs = arrays(0, spread)
    inputs.pop("preference")
    return inputs


def numpy_tailorpo(a, beta):
    first, second = log_ratios(a)
    return softplus(-beta * (first - second)).mean(-1)


@pytest.mark.parametrize("beta", [0.3, 4.0])
def test_value_and_gradient_against_the_formula(beta):
    inputs, formula = pairs(), functools.partial(numpy_tailorpo, beta=beta)
    np.testing.assert_allclose(tailorpo_loss(**float32(inputs), beta=beta).loss, formula(inputs), rtol=5e-6)
    for name, gradient in gradients(functools.partial(tailorpo_loss, beta=beta), inputs).items():
        np.testing.assert_allclose(gradient, central_differences(formula, inputs, name), rtol=1e-4, atol=1e-6)


def test_it_is_spo_without_the_interval():
    inputs = float32(pairs())
    np.testing.assert_array_equal(
        tailorpo_loss(**inputs, beta=2.0).loss, spo_loss(**inputs, beta=2.0, ratio_clip=np.inf).loss
    )


def test_a_steps_reward_is_the_expected_one_for_gaussian_data_and_linear_rewards():
    """E[w x_0 | x_t] of N(MEAN, SPREAD^2) in closed form."""
    model, weights = gaussian_model(SCHEDULE, predicts_noise), np.array([1.0, -2.0])
    x = jax.random.normal(jax.random.key(0), (50, 2))
    for place in (2, 6):
        step = take_steps(STEPS, place)
        got = step_reward(model, x, step, None, parameterisation=predicts_noise, score=lambda c, t, _: c @ weights)
        a = SCHEDULE.alphas_cumprod[int(step.time)]
        gain = np.sqrt(a) * SPREAD**2 / (a * SPREAD**2 + 1 - a)
        clean = MEAN + gain * (np.float64(x) - np.sqrt(a) * MEAN)
        np.testing.assert_allclose(got, clean @ weights, rtol=1e-3, atol=1e-3)


def quadratic(x):
    return -jnp.sum(jnp.square(x), axis=-1)


def test_guidance_moves_by_the_slope_times_the_distance_to_the_target():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    moved = guide_towards(x, quadratic, target=1.0, guidance_scale=1e-2)
    expected = np.float64(x) + 1e-2 * (1.0 + np.square(x).sum(-1, keepdims=True)) * -2 * np.float64(x)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
    assert (quadratic(moved) > quadratic(x)).all()
    np.testing.assert_array_equal(guide_towards(x, quadratic, target=1.0, guidance_scale=0.0), x)
    reached = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(guide_towards(reached, quadratic, target=-1.0, guidance_scale=5.0), reached, atol=1e-5)
    np.testing.assert_array_equal(guide_towards(jnp.zeros((2, 3)), quadratic, target=9.0, largest=0.5), 0.0)


def test_the_displacement_is_held_to_a_share_of_the_deviation():
    x, std = jax.random.normal(jax.random.key(0), (8, 3)), jnp.linspace(0.1, 0.8, 8)
    free = guide_towards(x, quadratic, std, target=1.0, guidance_scale=50.0) - x
    held = guide_towards(x, quadratic, std, target=1.0, guidance_scale=50.0, largest=0.5) - x
    np.testing.assert_allclose(np.linalg.norm(held, axis=-1), 0.5 * std * np.sqrt(3), rtol=1e-4)
    cosine = (free * held).sum(-1) / (np.linalg.norm(free, axis=-1) * np.linalg.norm(held, axis=-1))
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)


def test_guided_pairs_are_further_apart_in_reward():
    exact = mixture_model(SCHEDULE, predicts_noise, CENTRES, WIDTH)
    start, options = noise(jax.random.key(0), 128), dict(parameterisation=predicts_noise, score=score)
    guide = functools.partial(guide_towards, target=0.0, guidance_scale=1e-3, largest=0.5)
    plain, led = (
        tailorpo_rollout(exact, start, STEPS, **options, key=jax.random.key(1), start=9, guide=g) for g in (None, guide)
    )
    gaps = [reward(out.pairs.chosen[:, 0]) - reward(out.pairs.rejected[:, 0]) for out in (plain, led)]
    assert (gaps[1] >= gaps[0] - 1e-6).all() and gaps[1].mean() > gaps[0].mean()


def test_final_labels_say_little_about_early_steps():
    """Two chains from one noise: the order of their steps' rewards agrees with the final one late, not early."""
    steps = ddim_steps(SCHEDULE, leading_timesteps(20), eta=1.0)
    exact = mixture_model(SCHEDULE, predicts_noise, CENTRES, WIDTH)
    start = jnp.repeat(noise(jax.random.key(0), 1000), 2, axis=0)
    out = sample(exact, start, steps, parameterisation=predicts_noise, key=jax.random.key(1), record=(0, 20))
    assert out.trajectory is not None
    final = reward(out.latents)

    def agreement(place):
        states, step = out.trajectory.latents[:, place], take_steps(steps, place)
        rewards = step_reward(exact, states, step, None, parameterisation=predicts_noise, score=score)
        return float(jnp.mean((rewards[::2] > rewards[1::2]) == (final[::2] > final[1::2])))

    shares = [agreement(place) for place in (1, 9, 19)]
    assert shares[0] < 0.65 and 0.6 < shares[1] < 0.95 and shares[2] > 0.95 and sorted(shares) == shares


def turn(model, key, guide=None):
    start, draws = jax.random.split(key)
    out = tailorpo_rollout(
        model, noise(start), STEPS, parameterisation=predicts_noise, score=score, key=draws, start=0, guide=guide
    )
    plain = sample(model, noise(start), STEPS, parameterisation=predicts_noise, key=draws).latents
    return pair_rows(out.pairs, STEPS), reward(plain)


@pytest.mark.parametrize("seed", [0, 1])
def test_turns_raise_the_reward_of_ordinary_samples(seed):
    objective = from_step_loss(tailorpo_loss, DIFFUSION, shared_state=True)
    rewards = learn(objective, turn, turns=25, batches=4, seed=seed)[1]
    assert rewards[0] < -12 and rewards[-3:].mean() > rewards[0] + 6


@pytest.mark.slow
def test_guided_turns_raise_it_too():
    guide = functools.partial(guide_towards, target=0.0, guidance_scale=1e-3, largest=0.5)
    objective = from_step_loss(tailorpo_loss, DIFFUSION, shared_state=True)
    rewards = learn(objective, functools.partial(turn, guide=guide), turns=25, batches=4)[1]
    assert rewards[-3:].mean() > rewards[0] + 6
