"""Budgeted losses against float64 NumPy, what the budget does to training, and duels among answers."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import central_differences, float32, gradients

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.ipr_bcr import (
    bcr_dpo_loss,
    bcr_simpo_loss,
    budget_penalty,
    iterative_pairwise_ranking,
    likelihood_drop,
)

B, T = 5, 6
SIDES = ("chosen", "rejected")


def pairs(seed=0, spread=0.5):
    return numeric.pairs(seed, spread, drift=0.2)


def for_simpo(arrays):
    return {name: value for name, value in arrays.items() if name != "reference_rejected_logps"}


def summed(a, name, side):
    return (a[f"{name}_{side}_logps"] * a[f"{side}_mask"]).sum(-1)


def numpy_penalty(a, budget, length_normalize):
    drop = summed(a, "reference", "chosen") - summed(a, "policy", "chosen")
    if length_normalize:
        drop = drop / a["chosen_mask"].sum(-1)
    return np.maximum(0.0, drop - budget)


def numpy_bcr_dpo(a, beta, budget, penalty_coef, length_normalize):
    u, v = (summed(a, "policy", side) - summed(a, "reference", side) for side in SIDES)
    return np.logaddexp(0.0, -beta * (u - v)) + penalty_coef * numpy_penalty(a, budget, length_normalize)


def numpy_bcr_simpo(a, beta, gamma, budget, penalty_coef, length_normalize):
    mean_w, mean_l = (summed(a, "policy", side) / a[f"{side}_mask"].sum(-1) for side in SIDES)
    base = np.logaddexp(0.0, -(beta * (mean_w - mean_l) - gamma))
    return base + penalty_coef * numpy_penalty(a, budget, length_normalize)


MEMBERS = [
    (bcr_dpo_loss, numpy_bcr_dpo, dict(beta=0.1, budget=1.0, penalty_coef=0.1, length_normalize=False)),
    (bcr_dpo_loss, numpy_bcr_dpo, dict(beta=0.7, budget=0.2, penalty_coef=0.8, length_normalize=True)),
    (bcr_simpo_loss, numpy_bcr_simpo, dict(beta=2.0, gamma=1.0, budget=0.1, penalty_coef=0.1, length_normalize=True)),
    (bcr_simpo_loss, numpy_bcr_simpo, dict(beta=1.5, gamma=0.0, budget=0.5, penalty_coef=0.7, length_normalize=False)),
]


def arrays_for(loss, seed):
    return for_simpo(pairs(seed)) if loss is bcr_simpo_loss else pairs(seed)


@pytest.mark.parametrize(("loss", "formula", "options"), MEMBERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(loss, formula, options, seed):
    arrays = arrays_for(loss, seed)
    output = loss(**float32(arrays), **options)
    penalty = numpy_penalty(arrays, options["budget"], options["length_normalize"])
    assert np.any(penalty > 0) and np.any(penalty == 0), "the case must not be trivial"
    np.testing.assert_allclose(output.metrics["penalty"], penalty, rtol=1e-4, atol=1e-5)
    function = functools.partial(formula, **options)
    np.testing.assert_allclose(output.loss, function(arrays), rtol=2e-5, atol=1e-6)
    for name, gradient in gradients(functools.partial(loss, **options), arrays).items():
        np.testing.assert_allclose(gradient, central_differences(function, arrays, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "formula", "options"), MEMBERS[::2])
def test_defaults(loss, formula, options):
    arrays = arrays_for(loss, 2)
    np.testing.assert_allclose(loss(**float32(arrays)).loss, formula(arrays, **options), rtol=2e-5)


@pytest.mark.parametrize("options", [dict(penalty_coef=0.0), dict(budget=math.inf, penalty_coef=3.0)], ids=str)
def test_reduces_to_dpo(options):
    arrays = pairs(3)
    loss, dpo = functools.partial(bcr_dpo_loss, beta=0.4, **options), functools.partial(dpo_loss, beta=0.4)
    np.testing.assert_array_equal(loss(**float32(arrays)).loss, dpo(**float32(arrays)).loss)
    expected = gradients(dpo, arrays)
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-6)


def test_infinite_budget_is_simpo():
    arrays = for_simpo(pairs(3))
    expected = numpy_bcr_simpo(arrays, 2.0, 1.0, 0.0, 0.0, True)
    np.testing.assert_allclose(bcr_simpo_loss(**float32(arrays), budget=math.inf).loss, expected, rtol=2e-5)


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_no_penalty_and_none_of_its_gradient_at_the_reference(budget):
    arrays = pairs(4, spread=0.0)
    arrays |= {f"policy_{side}_logps": arrays[f"reference_{side}_logps"] for side in SIDES}
    loss = functools.partial(bcr_dpo_loss, budget=budget, penalty_coef=5.0)
    np.testing.assert_allclose(loss(**float32(arrays)).loss, np.log(2.0), rtol=1e-6)
    expected = gradients(dpo_loss, arrays)
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-6)


def test_penalty_is_continuous_with_a_zero_slope_up_to_the_budget():
    drop = jnp.array([-2.0, 0.4999, 0.5, 0.5001, 3.0])
    penalty = budget_penalty(drop=drop, budget=0.5)
    np.testing.assert_allclose(penalty, [0, 0, 0, 1e-4, 2.5], atol=1e-6)
    slope = jax.grad(lambda drop: budget_penalty(drop=drop, budget=0.5).sum())(drop)
    np.testing.assert_array_equal(slope, [0, 0, 0, 1, 1])


def test_loss_rises_with_the_coefficient_and_falls_with_the_budget():
    arrays = float32(pairs(5))
    by_price = [bcr_dpo_loss(**arrays, budget=0.2, penalty_coef=c).loss for c in (0.0, 0.1, 1.0)]
    by_budget = [bcr_dpo_loss(**arrays, budget=b).loss for b in (0.0, 0.5, 5.0)]
    assert np.all(np.diff(by_price, axis=0) >= 0) and np.any(np.diff(by_price, axis=0) > 0)
    assert np.all(np.diff(by_budget, axis=0) <= 0) and np.any(np.diff(by_budget, axis=0) < 0)


def test_drop_per_answer_per_token_and_of_nothing():
    arrays = dict(
        policy_chosen_logps=jnp.array([[-3.0, -3.0, jnp.nan], [-1.0, -1.0, -1.0]]),
        reference_chosen_logps=jnp.full((2, 3), -2.0),
        chosen_mask=jnp.array([[1, 1, 0], [0, 0, 0]]),
    )
    np.testing.assert_allclose(likelihood_drop(**arrays), [2.0, 0.0])
    np.testing.assert_allclose(likelihood_drop(**arrays, length_normalize=True), [1.0, 0.0])
    gradient = jax.grad(lambda reference: likelihood_drop(**{**arrays, "reference_chosen_logps": reference}).sum())(
        arrays["reference_chosen_logps"]
    )
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (bcr_dpo_loss, "beta", 0.0),
        (bcr_dpo_loss, "budget", -0.1),
        (bcr_dpo_loss, "budget", float("nan")),
        (bcr_dpo_loss, "penalty_coef", float("inf")),
        (bcr_simpo_loss, "gamma", float("inf")),
        (bcr_simpo_loss, "penalty_coef", -1.0),
    ],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(arrays_for(loss, 0)), **{name: value})


# Training: 4 prompts, 10 one-token answers with fixed shared features, only the prompts' vectors learn.

PROMPTS, ANSWERS, FEATURES = 4, 10, 4


def toy(seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(ANSWERS, FEATURES))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    for w in range(PROMPTS):
        other = rng.normal(size=FEATURES)
        close = 0.9 * features[w] + 0.45 * other / np.linalg.norm(other)
        features[w + PROMPTS] = close / np.linalg.norm(close)
    start = 2.0 * features[:PROMPTS] + 0.1 * rng.normal(size=(PROMPTS, FEATURES))
    return jnp.asarray(features, jnp.float32), jnp.asarray(start, jnp.float32)


@functools.partial(jax.jit, static_argnames=("budget", "penalty_coef"))
def drops_and_margins(features, start, budget, penalty_coef=0.05):
    """Drops of the chosen answers and differences of log ratios per prompt after 500 steps of gradient descent."""
    reference = jax.nn.log_softmax(start @ features.T)
    rows = jnp.arange(PROMPTS)

    def evaluate(vectors):
        policy = jax.nn.log_softmax(vectors @ features.T)
        return bcr_dpo_loss(
            policy_chosen_logps=policy[rows, rows][:, None],
            policy_rejected_logps=policy[rows, rows + PROMPTS][:, None],
            reference_chosen_logps=reference[rows, rows][:, None],
            reference_rejected_logps=reference[rows, rows + PROMPTS][:, None],
            chosen_mask=jnp.ones((PROMPTS, 1)),
            rejected_mask=jnp.ones((PROMPTS, 1)),
            budget=budget,
            penalty_coef=penalty_coef,
        )

    slope = jax.grad(lambda vectors: evaluate(vectors).loss.sum())
    metrics = evaluate(jax.lax.fori_loop(0, 500, lambda _, h: h - 2.0 * slope(h), start)).metrics
    return metrics["likelihood_drop"], metrics["margin"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_realised_drop_follows_the_budget_and_the_margin_grows_with_it(seed):
    budgets = (0.25, 0.5, 1.0)
    free, *budgeted = (drops_and_margins(*toy(seed), budget) for budget in (math.inf, *budgets))
    assert free[0].mean() > 1.5, "DPO alone falls further than any budget here"
    for (drop, _), budget in zip(budgeted, budgets, strict=True):
        assert np.all(drop < budget + 0.1)
        assert abs(drop.mean() - budget) < 0.15  # a prompt that never falls so far does not use its budget up
    margins = [margin.mean() for _, margin in (*budgeted, free)]
    assert all(a < b for a, b in itertools.pairwise(margins))


# Duels


def bradley_terry(rewards, bias=0.0):
    """A judge that answers 1/2 + bias for equal answers and stays in [0, 1]."""

    def judge(first, second):
        fair = 1 / (1 + math.exp(rewards[second] - rewards[first]))
        return (1 - 2 * abs(bias)) * fair + abs(bias) + bias

    return judge


@pytest.mark.parametrize("bias", [0.0, 0.2, -0.2])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_consistent_judge_finds_best_and_worst_in_any_order(count, bias):
    rng = np.random.default_rng(count)
    for _ in range(5):
        rewards, asked = rng.normal(size=count), []
        judge = bradley_terry(rewards, bias)

        def counted(first, second, judge=judge, asked=asked):
            asked.append((first, second))
            return judge(first, second)

        ranking = iterative_pairwise_ranking(counted, count=count, order=rng.permutation(count).tolist())
        assert (ranking.champion, ranking.weakest) == (rewards.argmax(), rewards.argmin())
        assert len(asked) == 2 * ranking.duels == 2 * ((count - 1) + (count - 2))
        assert {(b, a) for a, b in asked} == set(asked), "each duel is judged in both orders"
        assert bias or ranking.inconsistent == 0


@pytest.mark.parametrize("bias", [0.0, 0.1, 0.3])
def test_ties_keep_the_answer_that_was_there(bias):
    ranking = iterative_pairwise_ranking(lambda first, second: 0.5 + bias, count=4, order=[2, 0, 3, 1])
    assert (ranking.champion, ranking.weakest) == (2, 0)
    assert ranking.inconsistent == (5 if bias else 0)


def test_on_a_cycle_the_champion_depends_on_the_order():
    def judge(first, second):
        return 1.0 if (first - second) % 3 == 1 else 0.0

    champions = {iterative_pairwise_ranking(judge, count=3, order=o).champion for o in itertools.permutations(range(3))}
    assert champions == {0, 1, 2}


def test_a_noisy_biased_judge_still_beats_chance():
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(300):
        rewards = rng.normal(size=5)

        def judge(first, second, rewards=rewards):
            verdict = (rewards[first] > rewards[second]) == (rng.random() < 0.8)  # wrong once in five
            return 0.9 if verdict else 0.2  # and fond of the first

        ranking = iterative_pairwise_ranking(judge, count=5)
        gains.append(rewards[ranking.champion] - rewards[ranking.weakest])
    assert np.mean(gains) > 1.0  # standard error about 0.07; two random answers would give 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(count=1), "count is 1"),
        (dict(count=3, order=[0, 1, 1]), "order is"),
        (dict(count=3, order=[0, 1]), "order is"),
    ],
)
def test_impossible_rankings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        iterative_pairwise_ranking(lambda first, second: 0.5, **arguments)


@pytest.mark.parametrize("answer", [1.2, -0.1, float("nan")])
def test_a_judgement_that_is_no_probability_is_refused(answer):
    with pytest.raises(ValueError, match=r"judge\(0, 1\) is"):
        iterative_pairwise_ranking(lambda first, second: answer, count=2)
