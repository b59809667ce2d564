"""Intervals match published values and cover, exact tests count outcomes, regressions are at their minimum."""

import itertools
import math

import jax
import numpy as np
import pytest

from dpo_jax.statistics import (
    _student_quantile,
    bootstrap_interval,
    cohen_kappa,
    generator,
    logistic_regression,
    mean_interval,
    sigmoid,
    sign_test,
    wilson_interval,
)


def test_a_key_gives_its_own_draws():
    draws = [generator(jax.random.key(seed)).random(3).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_wilson_solves_its_defining_equation():
    """The bounds are the shares p whose score |k/n - p| / sqrt(p (1 - p) / n) equals z (Wilson 1927)."""
    rng = np.random.default_rng(0)
    for total in rng.integers(1, 500, 50):
        successes = int(rng.integers(0, total + 1))
        for confidence, z in ((0.95, 1.959963984540054), (0.9, 1.6448536269514722)):
            share = successes / total
            low, high = wilson_interval(successes, int(total), confidence)
            assert 0 <= low <= share <= high <= 1
            for bound in (low, high):
                if 0 < bound < 1:
                    score = abs(share - bound) / math.sqrt(bound * (1 - bound) / total)
                    assert score == pytest.approx(z, rel=1e-9)


def test_wilson_known_values_and_ends():
    # 81 of 263: Newcombe 1998, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 7).low == 0.0 and wilson_interval(7, 7).high == 1.0
    low, high = wilson_interval(2.5, 5)
    assert low + high == pytest.approx(1.0)
    for successes, total in ((1, 0), (-1, 5), (6, 5), (math.nan, 5)):
        with pytest.raises(ValueError):
            wilson_interval(successes, total)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence=95)


# Quantiles of Student's t as every printed table has them.
@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 5, 2.5706),
        (0.975, 10, 2.2281),
        (0.975, 30, 2.0423),
        (0.975, 120, 1.9799),
        (0.995, 1, 63.6567),
        (0.995, 7, 3.4995),
        (0.95, 4, 2.1318),
        (0.975, 10**6, 1.9600),
    ],
)
def test_student_quantiles(probability, freedom, expected):
    assert _student_quantile(probability, freedom) == pytest.approx(expected, abs=6e-5)


def test_student_quantiles_meet_where_the_method_changes():
    quantiles = [_student_quantile(0.975, freedom) for freedom in range(196, 206)]
    steps = np.diff(quantiles)
    np.testing.assert_allclose(np.diff(steps), np.diff(steps).mean(), rtol=0.1)
    assert (steps < 0).all()


def test_mean_interval_of_sleep_data():
    """Extra hours of sleep in Student's own paper of 1908: mean 1.58, s 1.2300, t(9) 2.2622."""
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert mean_interval(differences) == pytest.approx((0.7001, 2.4599), abs=1e-4)


def test_mean_interval_at_the_edges():
    assert mean_interval([2.0]) == (-math.inf, math.inf)
    assert mean_interval(np.full(5, 3.0)) == (3.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_intervals_cover_as_often_as_they_say():
    """2000 draws of 8 normal values: 95 % +- 1.5 % (three standard errors) of the intervals hold the true mean."""
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(2000, 8))
    held = np.mean([low <= 1.0 <= high for low, high in map(mean_interval, draws)])
    assert abs(held - 0.95) < 0.015


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (7, 3), (4, 4), (2, 9), (6, 1), (0, 8), (5, 7)])
def test_sign_test_counts_outcomes(wins, losses):
    games = wins + losses
    gap = abs(wins - losses)
    as_far = [abs(2 * sum(outcome) - games) >= gap for outcome in itertools.product((0, 1), repeat=games)]
    assert sign_test(wins, losses) == pytest.approx(np.mean(as_far)) == sign_test(losses, wins)


def test_sign_test_of_many_games():
    assert sign_test(3000, 3000) == 1.0
    assert sign_test(2000, 2200) == pytest.approx(math.erfc((200 - 1) / math.sqrt(2 * 4200)), rel=0.01)


def test_bootstrap_interval():
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    found = bootstrap_interval(values, jax.random.key(0), resamples=2000)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert found == bootstrap_interval(values, jax.random.key(0), resamples=2000)
    assert found != bootstrap_interval(values, jax.random.key(1), resamples=2000)
    narrow = bootstrap_interval(values, jax.random.key(0), resamples=2000, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_bootstrap_of_differences_keeps_the_pairs():
    rng = np.random.default_rng(1)
    before = (rng.random(300) < 0.6).astype(float)
    change = np.where(rng.random(300) < 0.3, 0.0, before) - before
    found = bootstrap_interval(change, jax.random.key(0))
    half = 1.96 * change.std(ddof=1) / np.sqrt(300)
    assert (found.low, found.high) == pytest.approx((change.mean() - half, change.mean() + half), abs=0.015)
    assert bootstrap_interval(before - before, jax.random.key(0)) == (0, 0)


def test_kappa():
    assert cohen_kappa(list("aabb"), list("aabb")) == 1
    assert cohen_kappa([0, 0, 1, 1], [0, 1, 0, 1]) == 0
    assert cohen_kappa([0, 1], [1, 0]) == -1
    assert math.isnan(cohen_kappa([1, 1], [1, 1])) and cohen_kappa([1, 1], [1, 0]) == 0
    table = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [20, 5, 10, 15], axis=0)
    assert cohen_kappa(table[:, 0], table[:, 1]) == pytest.approx(0.4)  # p_o 0.7, p_e 0.5


@pytest.mark.parametrize("penalty", [0.01, [1.0, 0.5, 0.0]])
@pytest.mark.parametrize("kind", ["overlapping", "separable", "skewed", "shares"])
def test_regressions_are_at_the_minimum(kind, penalty):
    rng = np.random.default_rng(3)
    x = np.column_stack([rng.normal(0, 3, (80, 2)), np.ones(80)])
    chance = sigmoid(x @ [1.0, -2.0, 0.5])
    targets = {
        "overlapping": (rng.random(80) < chance) * 1.0,
        "separable": (chance > 0.5) * 1.0,
        "skewed": (np.arange(80) < 3) * 1.0,
        "shares": chance,
    }[kind]
    weights = rng.random(80) / 40
    w = logistic_regression(x, targets, weights=weights, penalty=penalty)
    np.testing.assert_allclose(x.T @ (weights * (sigmoid(x @ w) - targets)) + np.multiply(penalty, w), 0, atol=1e-12)


def test_a_regression_without_penalty_finds_the_model_and_leaves_idle_directions():
    rng = np.random.default_rng(4)
    x = rng.normal(0, 2, (50, 2))
    w = logistic_regression(np.column_stack([x, np.zeros(50)]), sigmoid(x @ [0.7, -1.2]), weights=np.ones(50))
    np.testing.assert_allclose(w, [0.7, -1.2, 0.0], atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sign_test(-1, 2), "-1 and 2"),
        (lambda: bootstrap_interval([1.0], jax.random.key(0), confidence=1.0), "confidence is 1.0"),
        (lambda: bootstrap_interval([], jax.random.key(0)), r"values \(0,\)"),
        (lambda: cohen_kappa([], []), "0 and 0 labels"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
