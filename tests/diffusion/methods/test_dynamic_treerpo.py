"""Dynamic-TreeRPO against float64 NumPy: the loss, trees and their noise, calls of the model, and turns on a flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_modes import FLOW, initial, learn, noise, predict, reward
from numeric import central_differences, float32, gradients

from dpo_jax.diffusion.methods import tree_grpo_loss
from dpo_jax.diffusion.methods.dynamic_treerpo import (
    leaf_advantages,
    noise_growth,
    sibling_advantages,
    tree_layout,
    tree_noise_scales,
    tree_objective,
    tree_rollout,
    tree_values,
    velocity_regression,
)
from dpo_jax.diffusion.sampler import trajectory_logps
from dpo_jax.diffusion.schedule import flow_sigmas, predicts_flow
from dpo_jax.diffusion.trajectories import trajectory_rows
from dpo_jax.diffusion.transitions import flow_noise_scales, flow_sde_steps, take_steps

B, S, ROWS, WINDOW = 6, 4, 3, (2, 5)
SIGMAS = flow_sigmas(8, shift=1.0)
STEPS = flow_sde_steps(SIGMAS, tree_noise_scales(flow_noise_scales(SIGMAS), WINDOW))
MODEL = functools.partial(predict, initial(), process=FLOW)


def arrays(seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    old = -1.0 - rng.gamma(2.0, 0.2, (B, S))
    return {
        "policy_step_logps": old + rng.normal(0, spread, (B, S)),
        "old_step_logps": old,
        "advantages": np.array([1.5, -0.7, 2.0, -3.0, 0.2, 0.0]),
    }


def numpy_tree(a, low, high, eta):
    rho = np.exp(a["policy_step_logps"] - a["old_step_logps"])
    gain = a["advantages"].reshape(B, -1)
    trust = 1 + eta * np.tanh(gain)
    return np.maximum(-gain * rho, -gain * np.clip(rho, 1 - low * trust, 1 + high * trust)).mean(-1)


@pytest.mark.parametrize("options", [(0.1, 0.2, 0.5), (1e-4, 2e-4, 0.3), (0.2, 0.2, 0.0)])
def test_value_and_gradient_against_the_formula(options):
    low, high, eta = options
    inputs, formula = arrays(), functools.partial(numpy_tree, low=low, high=high, eta=eta)
    loss = functools.partial(tree_grpo_loss, clip_low=low, clip_high=high, reward_sensitivity=eta)
    np.testing.assert_allclose(loss(**float32(inputs)).loss, formula(inputs), rtol=1e-5, atol=1e-6)
    slope = gradients(loss, inputs)["policy_step_logps"]
    np.testing.assert_allclose(slope, central_differences(formula, inputs, "policy_step_logps"), rtol=1e-4, atol=1e-6)
    per_step = inputs | {"advantages": np.random.default_rng(1).normal(size=(B, S))}
    np.testing.assert_allclose(loss(**float32(per_step)).loss, formula(per_step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [dict(reward_sensitivity=1.5), dict(clip_low=-0.1), dict(clip_high=float("nan"))])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tree_grpo_loss(**float32(arrays()), **options)


def test_layout_and_noise():
    layout = tree_layout(3, 2)
    assert layout.nodes == (1, 3, 9) and layout.ancestors[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(noise_growth(4, growth=0.5), [1.125, 1.25, 1.375, 1.5])
    scales = tree_noise_scales(np.full(6, 2.0), (1, 3), growth=1.0)
    np.testing.assert_allclose(scales, [0, 3, 4, 0, 0, 0])
    grown, plain = (
        flow_sde_steps(SIGMAS, tree_noise_scales(flow_noise_scales(SIGMAS), WINDOW, growth=g)).std for g in (0.5, 0.0)
    )
    assert grown is not None and plain is not None
    assert (grown[WINDOW[1] - 1] / plain[WINDOW[1] - 1]) ** 2 == pytest.approx(1.5**2, rel=1e-5)


def roll(branch=2, rows=ROWS, key=1, model=MODEL):
    return tree_rollout(
        model, noise(jax.random.key(0), rows), STEPS, parameterisation=predicts_flow, key=jax.random.key(key),
        window=WINDOW, branch=branch,
    )  # fmt: skip


def test_leaves_share_what_their_ancestors_are():
    out, layout = roll(), tree_layout(2, 3)
    paths = out.trajectory
    assert paths is not None and paths.latents.shape == (ROWS, 8, 4, 2) and out.latents.shape == (ROWS, 8, 2)
    for k, ancestors in enumerate(layout.ancestors):
        states = np.asarray(paths.latents[:, :, k])
        for first, second in np.ndindex(8, 8):
            same = np.array_equal(states[:, first], states[:, second])
            assert same == (ancestors[first] == ancestors[second])
    flat = paths.latents.reshape(-1, 4, 2)
    logps = trajectory_logps(MODEL, flat, take_steps(STEPS, slice(*WINDOW)), parameterisation=predicts_flow)
    np.testing.assert_allclose(paths.logps.reshape(-1, 3), logps, rtol=1e-4, atol=1e-4)


def test_leaves_are_more_alike_the_later_they_part():
    out = roll(rows=200).latents
    apart = [float(jnp.mean(jnp.square(out[:, 0] - out[:, other]))) for other in (1, 2, 4)]
    assert 0 < apart[0] < apart[1] < apart[2]


@pytest.mark.parametrize("branch", [2, 3])
def test_number_of_model_calls(branch):
    calls = []

    def counted(latents, times, condition):
        jax.debug.callback(lambda: calls.append(len(latents)))
        return MODEL(latents, times, condition)

    jax.block_until_ready(roll(branch, model=counted).latents)
    jax.effects_barrier()
    depth, suffix = 3, len(STEPS.time) - WINDOW[1]
    assert sum(calls) == ROWS * (WINDOW[0] + sum(branch**k for k in range(depth)) + suffix * branch**depth)


def batch_of(out):
    paths = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), out.trajectory)
    return trajectory_rows(paths, take_steps(STEPS, slice(*WINDOW)), images=8, columns={"scores": reward(out.latents)})


def test_values_of_a_tree_are_those_of_its_paths():
    batch = batch_of(roll())
    scores = batch.columns["scores"]
    values = tree_values(MODEL, batch, scores, predicts_flow, branch=2)
    np.testing.assert_allclose(values.logps, batch.columns["old_step_logps"], rtol=1e-4, atol=1e-5)
    best = np.asarray(scores).argmax(1)
    for b in range(ROWS):
        for k in range(3):
            times = jnp.full(8, batch.steps.time[b, k])
            said = np.asarray(MODEL(batch.latents[b, :, k], times, None), np.float64)
            expected = np.square(said - said[best[b]]).mean(-1)
            np.testing.assert_allclose(values.velocity_gap[b, :, k], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(values.velocity_gap[:, :, 0], 0.0)  # the root is everybody's
    np.testing.assert_array_equal(values.velocity_gap[np.arange(ROWS), best], 0.0)
    with pytest.raises(ValueError, match="8 paths of 3 steps are no tree with 3"):
        tree_values(MODEL, batch, scores, predicts_flow, branch=3)


def test_on_policy_an_edge_has_the_advantages_of_the_leaves_below():
    """Gradient of the objective = minus the sum over edges of their leaves' advantages times the log-probability's."""
    batch = batch_of(roll())
    scores = batch.columns["scores"]
    objective = tree_objective(FLOW, sft_coef=0.0)
    params = initial()
    gains = leaf_advantages(scores, branch=2)
    np.testing.assert_allclose(gains.sum(1), 0.0, atol=1e-4)

    def total(params):
        return objective(functools.partial(predict, params, process=FLOW), None, batch, jax.random.key(0)).loss.sum()

    def by_edges(params):
        model = functools.partial(predict, params, process=FLOW)
        logps = tree_values(model, batch, scores, predicts_flow, branch=2).logps
        edges = 0.0
        for k in range(3):
            width = 2 ** (k + 1)
            sums = gains.reshape(ROWS, width, -1).sum(-1)
            edges -= jnp.sum(sums * logps[:, :: 8 // width, k])
        return edges / (8 * 3)

    for one, other in zip(jax.tree.leaves(jax.grad(total)(params)), jax.tree.leaves(jax.grad(by_edges)(params))):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_equal_scores_teach_nothing():
    batch = batch_of(roll())
    batch.columns["scores"] = jnp.full((ROWS, 8), 0.3)
    objective = tree_objective(FLOW, sft_coef=1.0)

    def total(params):
        return objective(functools.partial(predict, params, process=FLOW), None, batch, jax.random.key(0)).loss.sum()

    value, slope = jax.value_and_grad(total)(initial())
    assert value == 0 and all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(slope))


def test_regression_weights_run_from_the_best_leaf_to_the_worst():
    gap, scores = np.random.default_rng(0).gamma(2.0, 0.1, (2, 4, 3)), np.array([[1.0, 3.0, 2.0, 1.5], [0.0, 1, 2, 4]])
    omega = (scores.max(1, keepdims=True) - scores) / (np.ptp(scores, axis=1)[:, None] + 1e-8)
    got = velocity_regression(jnp.float32(gap), jnp.float32(scores))
    np.testing.assert_allclose(got, omega * gap.mean(-1), rtol=1e-5)
    assert got[0, 1] == 0 and got[0, 0] == pytest.approx(gap[0, 0].mean(), rel=1e-5)


def test_siblings_are_compared_with_each_other():
    scores = jnp.array([[5.0, 1.0, 2.0, 2.0]])
    root = 1 / np.sqrt(2)
    expected = np.array([[[root, root], [root, -root], [-root, 0], [-root, 0]]])
    np.testing.assert_allclose(sibling_advantages(scores, branch=2), expected, atol=1e-5)
    with pytest.raises(ValueError, match="6 leaves are no tree"):
        sibling_advantages(jnp.zeros((1, 6)), branch=2)


@pytest.mark.parametrize("window", [(0, 0), (3, 9), (5, 2)])
def test_a_window_outside_of_the_steps_is_refused(window):
    with pytest.raises(ValueError, match="a tree in the steps"):
        tree_rollout(
            MODEL, noise(jax.random.key(0), 2), STEPS, parameterisation=predicts_flow, key=jax.random.key(0),
            window=window,
        )  # fmt: skip


def turn(model, key):
    start, draws = jax.random.split(key)
    out = tree_rollout(
        model, noise(start, 32), STEPS, parameterisation=predicts_flow, key=draws, window=WINDOW, branch=2
    )
    return batch_of(out), reward(out.latents)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
@pytest.mark.parametrize("advantages", [leaf_advantages, sibling_advantages])
def test_turns_raise_the_reward(advantages, seed):
    objective = tree_objective(FLOW, clip_low=0.1, clip_high=0.2, sft_coef=0.01, advantages=advantages)
    rewards = learn(objective, turn, turns=25, batches=4, rate=1e-3, seed=seed, process=FLOW, reference=False)[1]
    assert rewards[-5:].mean() > rewards[:3].mean() + 3
