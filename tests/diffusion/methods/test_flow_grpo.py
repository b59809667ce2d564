"""GRPO of flow models against float64 NumPy: the two KLs, advantages, windows, and learning on a flow model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_modes import FLOW, learn, noise, reward
from numeric import central_differences, float32, gradients

from dpo_jax.diffusion.methods import grpo_code_kl_loss, grpo_kl_loss, grpo_loss
from dpo_jax.diffusion.methods.flow_grpo import batch_advantages, sliding_window, weighted_advantages, within_window
from dpo_jax.diffusion.ops import group_advantages
from dpo_jax.diffusion.sampler import sample
from dpo_jax.diffusion.schedule import flow_sigmas, predicts_flow
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.trajectories import trajectory_rows
from dpo_jax.diffusion.transitions import flow_noise_scales, flow_sde_steps, take_steps

B, S = 5, 4
SIGMAS = flow_sigmas(10, shift=1.0)


def arrays(seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    old = -1.0 - rng.gamma(2.0, 0.2, (B, S))
    return {
        "policy_step_logps": old + rng.normal(0, spread, (B, S)),
        "old_step_logps": old,
        "advantages": np.array([1.5, -0.7, 7.0, -6.0, 0.0]),
    }


def numpy_grpo(a, low, high):
    rho = np.exp(a["policy_step_logps"] - a["old_step_logps"])
    gain = np.clip(a["advantages"], -5, 5)[:, None]
    return np.maximum(-gain * rho, -gain * np.clip(rho, 1 - low, 1 + high)).mean(-1)


@pytest.mark.parametrize("clip", [(0.2, 0.1), (1e-4, 1e-4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(clip, seed):
    inputs, options = arrays(seed), dict(clip_low=clip[0], clip_high=clip[1])
    formula = functools.partial(numpy_grpo, low=clip[0], high=clip[1])
    np.testing.assert_allclose(grpo_loss(**float32(inputs), **options).loss, formula(inputs), rtol=1e-5, atol=1e-6)
    slope = gradients(functools.partial(grpo_loss, **options), inputs)["policy_step_logps"]
    np.testing.assert_allclose(slope, central_differences(formula, inputs, "policy_step_logps"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "scales"), [(grpo_kl_loss, "step_stds"), (grpo_code_kl_loss, "noise_scales")], ids=["exact", "code"]
)
def test_the_penalty_is_half_the_squared_gap_in_deviations(loss, scales):
    rng = np.random.default_rng(3)
    inputs, gap, scale = float32(arrays()), rng.gamma(2.0, 0.01, (B, S)), rng.uniform(0.1, 0.9, (B, S))
    scale[0, 1] = 0.0  # a step of the ODE
    more = float32({"step_gap": gap, scales: scale})
    squares = np.where(scale == 0, np.inf, 2 * scale**2)
    out = loss(**inputs, **more, beta=0.3)
    np.testing.assert_allclose(out.loss, grpo_loss(**inputs).loss + 0.3 * (gap / squares).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(out.metrics["kl"], (gap / squares).mean(-1), rtol=1e-5)
    assert (out.metrics["kl"] > 0).all()
    slope = jax.grad(lambda g: loss(**inputs, **(more | {"step_gap": g}), beta=0.3).loss.sum())(more["step_gap"])
    np.testing.assert_allclose(slope, 0.3 / squares / S, rtol=1e-5)
    np.testing.assert_array_equal(loss(**inputs, **(more | {"step_gap": jnp.zeros((B, S))})).metrics["kl"], 0.0)


def test_the_codes_kl_is_the_exact_one_times_the_length_of_the_step():
    scales = flow_noise_scales(SIGMAS)[1:5]
    stds = scales * np.sqrt(SIGMAS[1:5] - SIGMAS[2:6])
    inputs = float32(arrays()) | {"step_gap": jnp.full((B, S), 0.02)}

    def slopes(loss, **scale):
        return jax.grad(lambda g: loss(**(inputs | {"step_gap": g}), **scale).loss.sum())(inputs["step_gap"])

    exact = slopes(grpo_kl_loss, step_stds=jnp.tile(jnp.float32(stds), (B, 1)))
    code = slopes(grpo_code_kl_loss, noise_scales=jnp.tile(jnp.float32(scales), (B, 1)))
    np.testing.assert_allclose(code / exact, np.tile(SIGMAS[1:5] - SIGMAS[2:6], (B, 1)), rtol=1e-5)


@pytest.mark.parametrize("options", [dict(clip_low=-1.0), dict(clip_high=-1e-3), dict(advantage_clip=float("nan"))])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        grpo_loss(**float32(arrays()), **options)


def test_advantages_of_a_group():
    scores = np.random.default_rng(0).normal(2.0, 3.0, (4, 6))
    for ddof, floor in ((0, 1e-4), (1, 1e-8)):
        expected = (scores - scores.mean(-1, keepdims=True)) / (scores.std(-1, ddof=ddof, keepdims=True) + floor)
        got = group_advantages(jnp.float32(scores), ddof=ddof, floor=floor)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.sum(-1), 0.0, atol=1e-5)
        np.testing.assert_allclose(
            group_advantages(jnp.float32(7 * scores - 3), ddof=ddof, floor=floor), got, rtol=1e-3
        )
    pair = jnp.array([[3.0, 1.0]])
    np.testing.assert_allclose(group_advantages(pair, ddof=1, floor=1e-8), np.array([[1, -1]]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(group_advantages(pair, ddof=0, floor=1e-8), [[1, -1]], rtol=1e-6)


@pytest.mark.parametrize("value", [0.3, 1e6 + 0.1, -7.7])
def test_equal_scores_have_no_advantage(value):
    scores = jnp.full((3, 24), value, jnp.float32)  # whose mean float32 rounds
    np.testing.assert_array_equal(group_advantages(scores, ddof=1, floor=1e-8), 0.0)
    np.testing.assert_array_equal(batch_advantages(scores), 0.0)


def test_advantages_of_a_batch_and_of_several_rewards():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(4, 6)) * np.array([[1], [2], [5], [9]])
    expected = (scores - scores.mean(-1, keepdims=True)) / (scores.std() + 1e-4)
    np.testing.assert_allclose(batch_advantages(jnp.float32(scores)), expected, rtol=1e-4, atol=1e-5)
    several = rng.normal(size=(4, 6, 3)) * np.array([1.0, 100.0, 0.01])
    each = (several - several.mean(1, keepdims=True)) / several.std(1, ddof=1, keepdims=True)
    got = weighted_advantages(jnp.float32(several), jnp.array([0.5, 0.3, 0.2]))
    np.testing.assert_allclose(got, each @ np.array([0.5, 0.3, 0.2]), rtol=1e-3, atol=1e-4)


def test_the_window_slides_wraps_and_is_never_empty():
    windows = [sliding_window(i, steps=10, size=4, stride=1, hold=3) for i in range(36)]
    assert windows[:4] == [(0, 4), (0, 4), (0, 4), (1, 5)] and windows[29] == (9, 10) and windows[30] == (0, 4)
    assert {w[0] for w in windows} == set(range(10)) and all(a < b <= 10 for a, b in windows)
    assert [sliding_window(i, steps=7, size=3, stride=3, hold=1) for i in range(4)] == [(0, 3), (3, 6), (6, 7), (0, 3)]
    with pytest.raises(ValueError, match="no window of 4 steps of 3"):
        sliding_window(0, steps=3)
    np.testing.assert_array_equal(within_window(np.ones(5), (1, 3)), [0, 1, 1, 0, 0])


def grpo_turn(model, key, *, steps, record, prompts=16, group=16):
    """Groups that share their first noise; the last step, which would leave noise in the image, has none."""
    start, draws = jax.random.split(key)
    points = jnp.repeat(noise(start, prompts), group, axis=0)
    out = sample(model, points, steps, parameterisation=predicts_flow, key=draws, record=record)
    assert out.trajectory is not None
    rewards = reward(out.latents)
    advantages = group_advantages(rewards.reshape(prompts, group), ddof=1, floor=1e-8).reshape(-1)
    part = take_steps(steps, slice(*record))
    return trajectory_rows(out.trajectory, part, columns={"advantages": advantages}), rewards


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("window", [(0, 9), (2, 5)], ids=["all", "window"])
def test_turns_on_a_flow_model_raise_the_reward(window, seed):
    steps = flow_sde_steps(SIGMAS, within_window(flow_noise_scales(SIGMAS), window))
    turn = functools.partial(grpo_turn, steps=steps, record=window)
    objective = from_step_loss(grpo_loss, FLOW, clip_low=0.1, clip_high=0.1)
    _, rewards = learn(objective, turn, turns=25, batches=4, rate=1e-3, seed=seed, process=FLOW, reference=False)
    assert rewards[-5:].mean() > rewards[:3].mean() + 4


def test_a_strong_kl_keeps_the_reference():
    steps = flow_sde_steps(SIGMAS, within_window(flow_noise_scales(SIGMAS), (0, 9)))
    turn = functools.partial(grpo_turn, steps=steps, record=(0, 9))
    rewards = [
        learn(from_step_loss(grpo_kl_loss, FLOW, clip_low=0.1, clip_high=0.1, beta=beta), turn, turns=15, batches=4,
              rate=1e-3, process=FLOW)[1][-5:].mean()
        for beta in (1e-3, 100.0)
    ]  # fmt: skip
    assert rewards[0] > rewards[1] + 2
