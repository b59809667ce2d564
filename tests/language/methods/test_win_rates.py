"""Win rates and ratings against closed forms and enumeration, length control against what a biased judge did."""

import itertools
import math
import warnings

import jax
import numpy as np
import pytest

from dpo_jax.language.methods.win_rates import (
    bootstrap_ratings,
    both_orders,
    bradley_terry,
    elo,
    elo_scale,
    length_controlled_win_rate,
    position_consistency,
    win_matrix,
    win_rate,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_win_rate_of_a_mixed_list():
    preferences = [2, 1, 1.5, 0, 1.8, 1.1]
    share = np.array([1, 0, 0.5, 0.5, 0.8, 0.1])
    found = win_rate(preferences)
    assert found.win_rate == pytest.approx(share.mean())
    assert found.standard_error == pytest.approx(share.std(ddof=1) / math.sqrt(6))
    assert found.discrete_win_rate == pytest.approx(0.5)  # two wins, two draws, two losses
    assert (found.wins, found.draws, found.losses) == (2, 2, 2)
    assert math.isnan(win_rate([2]).standard_error)


def test_exchanging_the_models_turns_the_rate_round_and_draws_pull_to_one_half():
    preferences = np.random.default_rng(0).uniform(1.2, 2.0, 50)
    there, back = win_rate(preferences), win_rate(3 - preferences)
    assert back.win_rate == pytest.approx(1 - there.win_rate)
    assert back.standard_error == pytest.approx(there.standard_error) and back.wins == there.losses
    assert 0.5 < win_rate([*preferences, 1.5]).win_rate < there.win_rate


def test_both_orders_of_a_judge():
    first, second = [2, 2, 1, 1.5], [2, 1, 1, 1.5]
    np.testing.assert_allclose(both_orders(first, second), [2, 1.5, 1, 1.5])
    assert position_consistency(first, second) == 0.75
    assert position_consistency(first, first) == 1


# Length control


def judged(seed, bias=0.8, extra_mean=60.0, count=800):
    """A judge with nothing but a bias for length; (preferences, model lengths, baseline lengths)."""
    rng = np.random.default_rng(seed)
    extra = rng.normal(extra_mean, 120, count)
    share = sigmoid(bias * np.tanh(extra / 120) + rng.normal(0, 1, count))
    baseline = rng.uniform(500, 2000, count)
    return 1 + share, baseline + extra, baseline


def test_the_fit_is_where_the_gradient_of_the_log_loss_vanishes():
    preferences, model, baseline = judged(0)
    difficulty = np.random.default_rng(9).normal(size=800)
    found = length_controlled_win_rate(
        preferences, model_lengths=model, baseline_lengths=baseline, difficulty=difficulty
    )
    difference = baseline - model
    features = np.stack([np.tanh(difference / difference.std(ddof=1)), difficulty, np.ones(800)], axis=1)
    w = np.array([found.length_coef, found.difficulty_coef, found.intercept])
    gradient = features.T @ (sigmoid(features @ w) - (preferences - 1)) / 800 + 1e-6 * w
    np.testing.assert_allclose(gradient, 0, atol=1e-10)
    assert found.win_rate == pytest.approx(np.mean(sigmoid(w[1] * difficulty + w[2])))
    assert found.raw_win_rate == pytest.approx(np.mean(preferences - 1))


def test_a_pure_length_bias_is_taken_out():
    results = [_controlled(*judged(seed)) for seed in range(20)]
    raw, controlled = (np.mean([getattr(r, name) for r in results]) for name in ("raw_win_rate", "win_rate"))
    assert raw > 0.54 and controlled == pytest.approx(0.5, abs=0.006)
    assert all(r.length_coef < 0 and r.win_rate < r.raw_win_rate for r in results)


def test_no_support_at_equal_length_warns_and_over_corrects():
    rng = np.random.default_rng(2)
    baseline = rng.uniform(200, 400, 800)
    extra = baseline * rng.uniform(0.1, 0.9, 800)
    preferences = 1 + sigmoid(0.8 * np.tanh(extra / 120) + rng.normal(0, 1, 800))
    with pytest.warns(UserWarning, match="only 0% of the prompts"):
        found = length_controlled_win_rate(preferences, model_lengths=baseline + extra, baseline_lengths=baseline)
    assert found.opposite_share == 0 and found.raw_win_rate > 0.6 and found.win_rate < 0.48


def _controlled(preferences, model, baseline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about a third of the answers is shorter: no warning
        return length_controlled_win_rate(preferences, model_lengths=model, baseline_lengths=baseline)


def test_symmetries_of_length_control():
    preferences, model, baseline = judged(3)
    there, back = _controlled(preferences, model, baseline), _controlled(3 - preferences, baseline, model)
    assert back.win_rate == pytest.approx(1 - there.win_rate, abs=1e-6)
    same = _controlled(np.full(800, 1.5), baseline, baseline)
    assert (same.win_rate, same.length_coef, same.intercept) == pytest.approx((0.5, 0, 0), abs=1e-9)
    unbiased = _controlled(judged(3, bias=0.0)[0], model, baseline)
    assert unbiased.win_rate == pytest.approx(unbiased.raw_win_rate, abs=0.03)


def test_fractions_are_the_duplicated_rows_of_the_public_tool():
    """A preference of 1.75 weighs like three wins and a loss of the same answer."""
    rng = np.random.default_rng(4)
    model, baseline = rng.uniform(100, 900, (2, 40))
    quarters = rng.integers(0, 5, 40)
    soft = _controlled(1 + quarters / 4, model, baseline)
    repeated = np.concatenate([np.r_[np.full(q, 2.0), np.full(4 - q, 1.0)] for q in quarters])
    hard = _controlled(repeated, np.repeat(model, 4), np.repeat(baseline, 4))
    # The scale of the length term differs by the n - 1 of its standard deviation.
    assert hard.win_rate == pytest.approx(soft.win_rate, abs=1e-4)
    assert hard.length_coef == pytest.approx(soft.length_coef, rel=0.02)


def test_separable_preferences_stay_finite():
    found = _controlled(
        np.r_[np.full(20, 2.0), np.full(20, 1.0)], np.r_[np.full(20, 90), np.full(20, 10)], np.full(40, 50)
    )
    assert found.win_rate == pytest.approx(0.5, abs=1e-6) and found.length_coef < -5


# Ratings


def test_elo_by_hand():
    games = [(0, 1, 1.0), (1, 2, 0.5), (2, 0, 0.0)]
    ratings = [1000.0] * 3
    for a, b, score in games:
        change = 32 * (score - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a], ratings[b] = ratings[a] + change, ratings[b] - change
    found = elo(games, players=3)
    np.testing.assert_allclose(found, ratings, rtol=1e-12)
    assert found.sum() == pytest.approx(3000)
    assert not np.allclose(found, elo(games[::-1], players=3), atol=1e-6)  # the order matters
    assert elo([(0, 1, 1.0)], players=2, k=4)[0] == 1002


def test_bradley_terry_is_the_fixed_point_of_minorisation():
    wins = np.array([[0, 7, 4.5, 9], [3, 0, 6, 5], [1.5, 2, 0, 4], [1, 3, 2, 0]])
    strengths = bradley_terry(wins)
    assert strengths.mean() == pytest.approx(0, abs=1e-12)
    power = np.exp(strengths)
    games = wins + wins.T
    shares = games / (power[:, None] + power[None, :])
    updated = np.log(wins.sum(1) / (shares - np.diag(np.diag(shares))).sum(1))
    np.testing.assert_allclose(updated - updated.mean(), strengths, atol=1e-9)
    # Expected wins are the observed ones, and reversed games negate the strengths.
    np.testing.assert_allclose(np.sum(games * sigmoid(strengths[:, None] - strengths[None, :]), 1), wins.sum(1))
    np.testing.assert_allclose(bradley_terry(wins.T), -strengths, atol=1e-9)


def test_long_chains_of_players_are_connected():
    games = [(i, i + 1, score) for i in range(120) for score in (1.0, 0.0)]
    np.testing.assert_allclose(bradley_terry(win_matrix(games, players=121)), 0.0, atol=1e-6)
    with pytest.raises(ValueError, match="never lost"):
        bradley_terry(win_matrix(games[:-1], players=121))


def test_two_players_and_the_elo_scale():
    strengths = bradley_terry([[0, 3], [1, 0]])
    assert strengths[0] - strengths[1] == pytest.approx(math.log(3), rel=1e-9)
    assert np.diff(elo_scale([0.0, math.log(10.0)]))[0] == pytest.approx(400)
    assert elo_scale(0.0) == 1000


def test_games_order_ties_and_prior():
    games = [(0, 1, 1.0), (1, 0, 1.0), (0, 1, 0.5), (1, 2, 1.0), (2, 0, 0.5), (0, 2, 1.0), (2, 1, 1.0)]
    np.testing.assert_array_equal(win_matrix([(0, 1, 0.5)], players=2), [[0, 0.5], [0.5, 0]])
    there, back = (bradley_terry(win_matrix(g, players=3)) for g in (games, games[::-1]))
    np.testing.assert_allclose(there, back, atol=1e-10)
    unbeaten = [[0, 4, 3], [0, 0, 2], [0, 1, 0]]
    with pytest.raises(ValueError, match=r"prior such as 0\.1"):
        bradley_terry(unbeaten)
    weak, strong = (bradley_terry(unbeaten, prior=p) for p in (0.1, 10.0))
    assert np.isfinite(weak).all() and weak[0] > strong[0] > 0
    with pytest.raises(ValueError, match="never met"):
        bradley_terry([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])


def test_strengths_are_found_again():
    rng = np.random.default_rng(5)
    true = np.array([1.0, 0.3, -0.2, -1.1])
    games = []
    for a, b in itertools.combinations(range(4), 2):
        games += [(a, b, float(rng.random() < sigmoid(true[a] - true[b]))) for _ in range(800)]
    np.testing.assert_allclose(bradley_terry(win_matrix(games, players=4)), true, atol=0.15)


def test_bootstrap_of_ratings():
    games = [(0, 1, float(i % 4 != 0)) for i in range(80)]
    draws = bootstrap_ratings(
        games, lambda g: bradley_terry(win_matrix(g, players=2)), jax.random.key(0), resamples=300
    )
    gap = draws[:, 0] - draws[:, 1]
    assert draws.shape == (300, 2)
    assert gap.mean() == pytest.approx(math.log(3), abs=0.1)
    assert gap.std() == pytest.approx(1 / math.sqrt(80 * 0.75 * 0.25), rel=0.2)  # the delta method


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate([]), "give \\[N\\]"),
        (lambda: win_rate([2, float("nan")]), "unjudged"),
        (lambda: win_rate([0.5]), r"\[1, 2\]"),
        (lambda: length_controlled_win_rate([2, 1], model_lengths=[1], baseline_lengths=[1]), "differ"),
        (lambda: length_controlled_win_rate([2], model_lengths=[1], baseline_lengths=[1], l2=0.0), "l2 is 0"),
        (lambda: elo([(0, 0, 1.0)], players=2), "game"),
        (lambda: elo([(0, 1, 2.0)], players=2), "game"),
        (lambda: bradley_terry([[0, 1]]), "square"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
