"""CaPO against float64 NumPy written from the formulas; calibration and frontiers."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import at_margin, errors, gains, margin
from numeric import assert_formula, float32, gradients, sigmoid

from dpo_jax.diffusion.methods.capo import (
    calibrated_rewards,
    capo_loss,
    capo_outer_weight_loss,
    capo_unweighted_loss,
    draw_pair,
    level_weights,
    pareto_frontiers,
)
from dpo_jax.diffusion.methods.diffusion_baselines import diffusion_ipo_loss
from dpo_jax.diffusion.schedule import flow_level, snr


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    return {**errors(seed), "reward_gap": rng.uniform(-0.2, 0.9, 5), "log_snr": rng.normal(1.0, 2.0, 5)}


def numpy_capo(a, beta, bias=1.5):
    weight = sigmoid(bias - a["log_snr"])
    return (a["reward_gap"] - beta * weight * (gains(a, "chosen") - gains(a, "rejected"))) ** 2


def numpy_outer(a, beta, bias=1.5):
    return sigmoid(bias - a["log_snr"]) * (a["reward_gap"] - beta * margin(a)) ** 2


def without_level(arrays) -> dict[str, Any]:
    return {n: v for n, v in arrays.items() if n != "log_snr"}


@pytest.mark.parametrize("options", [dict(beta=2.0), dict(beta=5.0, bias=0.0)])
@pytest.mark.parametrize(("loss", "formula"), [(capo_loss, numpy_capo), (capo_outer_weight_loss, numpy_outer)])
def test_value_and_gradient(loss, formula, options):
    assert_formula(loss, lambda a: formula(a, **options), pairs(), **options)


def test_value_and_gradient_without_weights():
    assert_formula(
        capo_unweighted_loss, lambda a: (a["reward_gap"] - 2.0 * margin(a)) ** 2, without_level(pairs()), beta=2.0
    )


def test_a_gap_of_one_is_ipo_times_beta_squared():
    arrays, beta = errors(), 3.0
    own = capo_unweighted_loss(**float32({**arrays, "reward_gap": np.ones(5)}), beta=beta).loss
    np.testing.assert_allclose(own, beta**2 * diffusion_ipo_loss(**float32(arrays), beta=beta / 2).loss, rtol=1e-5)


def test_start_and_optimum():
    gap, beta = np.array([0.3, -0.2, 0.7]), 4.0
    start = {**at_margin(np.zeros(3)), "reward_gap": gap, "log_snr": np.array([-1.0, 1.5, 4.0])}
    np.testing.assert_allclose(capo_loss(**float32(start), beta=beta).loss, gap**2, rtol=1e-6)
    slopes = gradients(capo_loss, start, beta=beta)
    np.testing.assert_allclose(
        slopes["policy_chosen_error"], 2 * beta * sigmoid(1.5 - start["log_snr"]) * gap, rtol=1e-5
    )
    np.testing.assert_array_equal(slopes["policy_chosen_error"], -slopes["policy_rejected_error"])
    best = {**without_level(start), **at_margin(gap / beta)}
    np.testing.assert_allclose(capo_unweighted_loss(**float32(best), beta=beta).loss, 0.0, atol=1e-10)
    np.testing.assert_allclose(gradients(capo_unweighted_loss, best, beta=beta)["policy_chosen_error"], 0.0, atol=1e-5)


def test_weights_of_levels():
    log_snr = np.linspace(-60, 60, 25)
    weights = np.asarray(level_weights(jnp.asarray(log_snr)))
    assert np.all(np.diff(weights) <= 0) and weights[0] == pytest.approx(1) and weights[-1] < 1e-20
    assert level_weights(jnp.array([1.5]))[0] == pytest.approx(0.5)
    sigma = np.array([0.1, 0.5, 0.9])
    straight = np.log(np.asarray(snr(flow_level(jnp.asarray(sigma)))))
    np.testing.assert_allclose(straight, 2 * np.log((1 - sigma) / sigma), rtol=1e-4, atol=1e-5)


# Calibration


def test_calibration_by_counting():
    rewards = np.random.default_rng(0).normal(0, 2, (3, 5))
    expected = np.zeros((3, 5))
    for j, (i, other) in itertools.product(range(3), itertools.permutations(range(5), 2)):
        expected[j, i] += sigmoid(rewards[j, i] - rewards[j, other]) / 4
    calibrated = calibrated_rewards(rewards)
    np.testing.assert_allclose(calibrated, expected, rtol=1e-10)
    np.testing.assert_allclose(calibrated.mean(axis=1), 0.5, rtol=1e-10)
    assert np.all((calibrated > 0) & (calibrated < 1))
    np.testing.assert_allclose(calibrated_rewards(rewards + 7.0), calibrated, rtol=1e-8)
    np.testing.assert_array_equal(np.argsort(calibrated), np.argsort(rewards))


def test_calibration_of_two_and_against_others():
    np.testing.assert_allclose(calibrated_rewards(np.array([[1.2, 0.5]])), [[sigmoid(0.7), sigmoid(-0.7)]])
    others = np.array([[0.0, 1.0, -1.0]])
    np.testing.assert_allclose(
        calibrated_rewards(np.array([[0.4]]), others), [[np.mean(sigmoid(0.4 - others[0]))]], rtol=1e-10
    )
    huge = calibrated_rewards(np.array([[1e6, -1e6, 0.0]]))
    np.testing.assert_allclose(huge, [[1.0, 0.0, 0.5]])


@pytest.mark.parametrize(
    ("rewards", "others"), [(np.ones((2, 1)), None), (np.ones(3), None), (np.ones((2, 2)), np.ones((3, 2)))]
)
def test_rewards_without_others_are_refused(rewards, others):
    with pytest.raises(ValueError, match="rewards"):
        calibrated_rewards(rewards, others)


# Frontiers


def by_definition(rewards):
    def dominates(a, b):
        return np.all(rewards[:, a] >= rewards[:, b]) and np.any(rewards[:, a] > rewards[:, b])

    samples = range(rewards.shape[1])
    upper = {i for i in samples if not any(dominates(j, i) for j in samples)}
    lower = {i for i in samples if not any(dominates(i, j) for j in samples)}
    return upper - lower, lower - upper


@pytest.mark.parametrize("seed", range(5))
def test_frontiers_by_definition(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.integers(0, 5, (2 + seed % 2, 8)).astype(float)  # with equals
    frontiers = pareto_frontiers(rewards)
    assert (set(frontiers.chosen), set(frontiers.rejected)) == by_definition(rewards)
    monotone = np.exp(rewards * np.arange(1, len(rewards) + 1)[:, None] / 3)
    for one, other in zip(pareto_frontiers(monotone), frontiers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_frontiers_of_one_reward_are_best_and_worst():
    frontiers = pareto_frontiers(np.array([[0.2, 0.9, 0.9, 0.1, 0.5]]))
    assert frontiers.chosen.tolist() == [1, 2] and frontiers.rejected.tolist() == [3]


def test_samples_that_cannot_be_compared_make_no_pair():
    rewards = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    frontiers = pareto_frontiers(rewards)
    assert not len(frontiers.chosen) and not len(frontiers.rejected)
    assert draw_pair(rewards, random=np.random.default_rng(0)) is None
    assert draw_pair(np.ones((2, 4)), random=np.random.default_rng(0)) is None


def test_drawn_pairs_come_from_the_frontiers_with_their_gap():
    rewards = np.random.default_rng(1).normal(size=(2, 8))
    calibrated, random = calibrated_rewards(rewards), np.random.default_rng(0)
    frontiers, seen = pareto_frontiers(calibrated), set()
    for _ in range(200):
        pair = draw_pair(calibrated, random=random)
        assert pair is not None
        expected = calibrated.mean(axis=0)[pair.chosen] - calibrated.mean(axis=0)[pair.rejected]
        assert pair.reward_gap == pytest.approx(expected)
        seen.add((pair.chosen, pair.rejected))
    assert seen == set(itertools.product(frontiers.chosen.tolist(), frontiers.rejected.tolist()))
