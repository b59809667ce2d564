"""DDPO against float64 NumPy: the clip, its dead sides, on-policy equality, the memory of prompts, and learning."""

import functools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_modes import DIFFUSION, STEPS, learn, noise, reward
from numeric import central_differences, float32, gradients

from dpo_jax.diffusion.methods import ddpo_loss, ddpo_sf_loss
from dpo_jax.diffusion.methods.ddpo import prompt_memory, track_prompts
from dpo_jax.diffusion.ops import group_advantages
from dpo_jax.diffusion.sampler import sample
from dpo_jax.diffusion.schedule import predicts_noise
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.trajectories import trajectory_rows

B, S = 6, 5


def arrays(seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    old = -1.0 - rng.gamma(2.0, 0.2, (B, S))
    return {
        "policy_step_logps": old + rng.normal(0, spread, (B, S)),
        "old_step_logps": old,
        "advantages": np.array([1.5, -0.7, 9.0, -8.0, 0.4, 0.0]),
    }


def numpy_ddpo(a, clip_range, advantage_clip):
    rho = np.exp(a["policy_step_logps"] - a["old_step_logps"])
    gain = np.clip(a["advantages"], -advantage_clip, advantage_clip)[:, None]
    return np.maximum(-gain * rho, -gain * np.clip(rho, 1 - clip_range, 1 + clip_range)).mean(-1)


@pytest.mark.parametrize(
    "options", [dict(clip_range=0.2, advantage_clip=5.0), dict(clip_range=1e-4, advantage_clip=2.0)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(options, seed):
    inputs, formula = arrays(seed), functools.partial(numpy_ddpo, **options)
    np.testing.assert_allclose(ddpo_loss(**float32(inputs), **options).loss, formula(inputs), rtol=1e-5, atol=1e-6)
    slope = gradients(functools.partial(ddpo_loss, **options), inputs)["policy_step_logps"]
    np.testing.assert_allclose(slope, central_differences(formula, inputs, "policy_step_logps"), rtol=1e-4, atol=1e-6)


def test_score_function_value_and_gradient():
    inputs = arrays()
    inputs.pop("old_step_logps")
    gain = np.clip(inputs["advantages"], -5, 5)
    np.testing.assert_allclose(
        ddpo_sf_loss(**float32(inputs)).loss, -gain * inputs["policy_step_logps"].mean(-1), rtol=1e-5
    )
    slope = gradients(ddpo_sf_loss, inputs)["policy_step_logps"]
    np.testing.assert_allclose(slope, np.tile(-gain[:, None] / S, S), rtol=1e-6)


def test_on_policy_both_losses_have_one_gradient():
    inputs = arrays(spread=0.0)
    out = ddpo_loss(**float32(inputs))
    np.testing.assert_allclose(out.loss, -np.clip(inputs["advantages"], -5, 5), rtol=1e-6)
    np.testing.assert_array_equal(out.metrics["ratio"], 1.0)
    clipped = gradients(ddpo_loss, inputs)["policy_step_logps"]
    inputs.pop("old_step_logps")
    np.testing.assert_allclose(clipped, gradients(ddpo_sf_loss, inputs)["policy_step_logps"], rtol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "shift", "moves"), [(1.0, 0.2, False), (1.0, -0.2, True), (-1.0, 0.2, True), (-1.0, -0.2, False)]
)
def test_only_steps_that_have_not_gone_far_enough_move(advantage, shift, moves):
    inputs = arrays(spread=0.0) | {"advantages": np.full(B, advantage)}
    inputs["policy_step_logps"] += shift
    out = ddpo_loss(**float32(inputs), clip_range=0.1)
    slope = gradients(functools.partial(ddpo_loss, clip_range=0.1), inputs)["policy_step_logps"]
    assert np.all((slope != 0) == moves)
    np.testing.assert_array_equal(out.metrics["clip_share"], 0.0 if moves else 1.0)


def test_ratios_that_overflow_are_held():
    inputs = arrays(spread=0.0) | {"advantages": np.full(B, -1.0)}
    inputs["policy_step_logps"] += 1e4
    out = ddpo_loss(**float32(inputs))
    np.testing.assert_allclose(out.loss, np.exp(20.0), rtol=1e-5)
    assert np.isfinite(gradients(ddpo_loss, inputs)["policy_step_logps"]).all()


@pytest.mark.parametrize("options", [dict(clip_range=-0.1), dict(clip_range=2.0), dict(advantage_clip=0.0)])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ddpo_loss(**float32(arrays()), **options)


def numpy_tracker(history, prompts, rewards, least):
    """The loop over prompts with a queue for each."""
    advantages = np.zeros(len(rewards))
    for prompt in np.unique(prompts):
        mine = rewards[prompts == prompt]
        history[prompt].extend(mine)
        known = np.array(history[prompt]) if len(history[prompt]) >= least else rewards
        advantages[prompts == prompt] = (mine - known.mean()) / (known.std() + 1e-6)
    return advantages


@pytest.mark.parametrize(("size", "least"), [(4, 3), (2, 1), (16, 16)])
def test_the_memory_of_prompts_is_a_queue_for_each(size, least):
    rng, memory = np.random.default_rng(0), prompt_memory(3, size=size)
    history = [deque(maxlen=size) for _ in range(3)]
    track = jax.jit(functools.partial(track_prompts, least=least))
    for _ in range(9):
        prompts, rewards = rng.integers(0, 3, 7), rng.normal(2.0, 3.0, 7)
        memory, advantages = track(memory, jnp.asarray(prompts), jnp.asarray(rewards, jnp.float32))
        np.testing.assert_allclose(advantages, numpy_tracker(history, prompts, rewards, least), rtol=2e-4, atol=2e-4)
    for held, queue, count in zip(memory.rewards, history, memory.count):
        np.testing.assert_allclose(np.sort(held[: int(count)]), np.sort(queue), rtol=1e-6)


def test_a_memory_that_can_never_have_enough_is_refused():
    with pytest.raises(ValueError, match="least is 17 of a memory of 16"):
        track_prompts(prompt_memory(2), jnp.zeros(1, int), jnp.zeros(1), least=17)


def turn(model, key):
    start, draws = jax.random.split(key)
    out = sample(model, noise(start), STEPS, parameterisation=predicts_noise, key=draws, record=(0, len(STEPS.time)))
    assert out.trajectory is not None
    rewards = reward(out.latents)
    return trajectory_rows(out.trajectory, STEPS, columns={"advantages": group_advantages(rewards)}), rewards


@pytest.mark.parametrize("seed", [0, 1])
def test_turns_bring_all_points_to_the_rewarded_mode(seed):
    objective = from_step_loss(ddpo_loss, DIFFUSION, clip_range=0.1)
    _, rewards = learn(objective, turn, turns=30, batches=8, rate=1e-3, seed=seed, reference=False)
    assert rewards[0] < -12 and rewards[-3:].mean() > -1.0


@pytest.mark.slow
def test_importance_sampling_with_eight_updates_a_turn_learns_more_than_the_score_function_with_one():
    many = from_step_loss(ddpo_loss, DIFFUSION, clip_range=0.1)
    reused = learn(many, turn, turns=15, batches=8, rate=1e-3, reference=False)[1]
    single = learn(from_step_loss(ddpo_sf_loss, DIFFUSION), turn, turns=15, rate=1e-3, reference=False)[1]
    assert reused[-3:].mean() > single[-3:].mean() + 3 and single[-3:].mean() > single[:3].mean()
