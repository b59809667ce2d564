"""Pair selection against loops, rows for the next round, and what the choice of the reference does in exact rounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.iterative_dpo import (
    Selection,
    best_vs_low,
    best_vs_worst,
    first_pair,
    length_penalised,
    mixture_log_probs,
    preference_rows,
    reference_gains,
)

P, N = 12, 5
RULES = (best_vs_worst, best_vs_low, first_pair)


def samples(seed=0):
    """Scores with ties (tenths), ragged validity, one prompt without a valid answer and one with a single one."""
    rng = np.random.default_rng(seed)
    scores, valid = rng.integers(0, 8, (P, N)) / 10, rng.random((P, N)) < 0.7
    valid[0], valid[1] = False, np.arange(N) == 3
    return scores, valid


def loop_best_vs_worst(scores, here):
    chosen = max(here, key=lambda i: (scores[i], -i))
    return chosen, min(here, key=lambda i: (scores[i], i))


def loop_best_vs_low(scores, here, deviations=2.0):
    chosen = max(here, key=lambda i: (scores[i], -i))
    target = np.mean(scores[here]) - deviations * np.std(scores[here])
    return chosen, min((i for i in here if i != chosen), key=lambda i: (abs(scores[i] - target), i))


def loop_first_pair(scores, here):
    a, b = here[:2]
    return (a, b) if scores[a] >= scores[b] else (b, a)


def choose(rule, scores, valid, **options):
    return jax.device_get(rule(jnp.asarray(scores, jnp.float32), jnp.asarray(valid), **options))


@pytest.mark.parametrize(
    ("rule", "loop", "options"),
    [
        (best_vs_worst, loop_best_vs_worst, {}),
        (best_vs_low, loop_best_vs_low, {}),
        (best_vs_low, loop_best_vs_low, dict(deviations=0.5)),
        (first_pair, loop_first_pair, {}),
    ],
)
@pytest.mark.parametrize("min_margin", [0.0, 0.35])
@pytest.mark.parametrize("seed", [0, 1])
def test_selection_against_loops(rule, loop, options, min_margin, seed):
    scores, valid = samples(seed)
    found = choose(rule, scores, valid, min_margin=min_margin, **options)
    for prompt in range(P):
        here = list(np.flatnonzero(valid[prompt]))
        if len(here) < 2:
            assert found.keep[prompt] == 0
            continue
        chosen, rejected = loop(scores[prompt], here, **options)
        # Equal distances from the target are told apart by rounding: there either is right.
        gap = scores[prompt, chosen] - scores[prompt, rejected]
        assert scores[prompt, found.chosen[prompt]] == scores[prompt, chosen]
        if rule is not best_vs_low:
            assert gap <= 0 or (found.chosen[prompt], found.rejected[prompt]) == (chosen, rejected)
            assert found.keep[prompt] == (gap > min_margin)
        else:
            target = np.mean(scores[prompt, here]) - options.get("deviations", 2.0) * np.std(scores[prompt, here])
            distance = abs(scores[prompt, found.rejected[prompt]] - target)
            assert distance == pytest.approx(abs(scores[prompt, rejected] - target), abs=1e-6)
    assert 0 < found.keep.sum() < P


def test_a_kept_pair_is_valid_and_strictly_ordered():
    scores, valid = samples(2)
    for rule in RULES:
        found = choose(rule, np.where(valid, scores, np.nan), valid)
        kept = np.flatnonzero(found.keep)
        assert kept.size
        for index in (found.chosen, found.rejected):
            assert valid[kept, index[kept]].all()
        assert np.all(scores[kept, found.chosen[kept]] > scores[kept, found.rejected[kept]])


def test_best_vs_low_passes_over_an_outlier():
    scores = np.array([[1.0, 0.9, 0.8, 0.5, -9.0] + [0.7] * 15])
    valid = np.ones_like(scores, bool)
    assert choose(best_vs_worst, scores, valid).rejected[0] == 4
    target = scores.mean() - 0.5 * scores.std()
    assert choose(best_vs_low, scores, valid, deviations=0.5).rejected[0] == np.argmin(np.abs(scores - target)) == 3


def test_a_verifier_keeps_prompts_with_right_and_wrong_answers():
    table = np.array(list(itertools.product([0.0, 1.0], repeat=3)))
    found = choose(best_vs_worst, table, np.ones_like(table))
    np.testing.assert_array_equal(found.keep, (table.max(-1) > table.min(-1)).astype(float))


@pytest.mark.parametrize("rule", RULES)
def test_selection_knows_no_offset_or_scale(rule):
    scores, valid = samples(3)
    before = choose(rule, 64 * scores, valid)
    for other in (64 * scores + 8.0 * np.arange(P)[:, None], 128 * scores):
        if rule is best_vs_low:  # equal distances from the target may fall either way
            np.testing.assert_array_equal(choose(rule, other, valid).chosen, before.chosen)
        else:
            jax.tree.map(np.testing.assert_array_equal, choose(rule, other, valid), before)


def test_length_penalty():
    scores, lengths = jnp.array([[1.0, 1.2]]), jnp.array([[10, 40]])
    assert choose(best_vs_worst, scores, jnp.ones((1, 2))).chosen[0] == 1
    penalised = length_penalised(scores, lengths, length_penalty=0.01)
    np.testing.assert_allclose(penalised, [[0.9, 0.8]], rtol=1e-5)
    assert choose(best_vs_worst, penalised, jnp.ones((1, 2))).chosen[0] == 0


@pytest.mark.parametrize("call", [
    lambda: choose(best_vs_worst, np.zeros((1, 2)), np.ones((1, 2)), min_margin=-1.0),
    lambda: length_penalised(jnp.zeros(2), jnp.zeros(2), length_penalty=-0.1),
    lambda: mixture_log_probs(jnp.zeros(2), jnp.zeros(2), weight=1.5),
    lambda: reference_gains(3, weight=-0.1),
    lambda: reference_gains(-1, weight=0.1),
])  # fmt: skip
def test_options_out_of_range(call):
    with pytest.raises(ValueError, match=r"min_margin|length_penalty|weight|rounds"):
        call()


# Rows


def selection(chosen, rejected, keep):
    return Selection(jnp.array(chosen), jnp.array(rejected), jnp.array(keep))


def test_rows_of_the_next_round():
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.5, 2.0, -1.0]},
        {"prompt": "q", "completions": ["same", "same"], "scores": [1.0, 0.0]},
        {"prompt": "r", "completions": ["x", "y"], "scores": [1.0, 1.0]},
    ]
    found = preference_rows(rows, selection([1, 0, 0], [2, 1, 1], [1.0, 1.0, 0.0]), round=3)
    expected = {"prompt": "p", "chosen": "b", "rejected": "c", "chosen_score": 2.0, "rejected_score": -1.0, "round": 3}
    assert found == [expected]
    assert preference_rows([], selection([], [], []), round=0) == []


def test_rows_that_do_not_match():
    row = {"prompt": "p", "completions": ["a", "b"], "scores": [1.0]}
    with pytest.raises(ValueError, match="1 samples and a selection for 2"):
        preference_rows([row], selection([0, 0], [1, 1], [1.0, 1.0]), round=0)
    with pytest.raises(ValueError, match="sample 0 has 2 completions and 1 scores"):
        preference_rows([row], selection([0], [1], [1.0]), round=0)


# The reference


def log_softmax(x):
    return x - np.logaddexp.reduce(x, -1, keepdims=True)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixture_against_the_formula(weight):
    rng = np.random.default_rng(0)
    initial, policy = rng.normal(0, 2, (2, 3, 6))
    found = mixture_log_probs(jnp.asarray(initial + 4.0), jnp.asarray(policy), weight=weight)
    np.testing.assert_allclose(found, log_softmax((1 - weight) * initial + weight * policy), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_mixture_of_impossible_outcomes_is_no_nan(weight):
    initial, policy = jnp.log(jnp.array([0.5, 0.5, 0.0])), jnp.log(jnp.array([0.2, 0.0, 0.8]))
    found = np.exp(mixture_log_probs(initial, policy, weight=weight))
    assert found.sum() == pytest.approx(1.0, rel=1e-6)
    expected = {0.0: [0.5, 0.5, 0.0], 0.3: [1.0, 0.0, 0.0], 1.0: [0.2, 0.0, 0.8]}[weight]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_exact_rounds_follow_the_gains(weight):
    """log pi_{t+1} = log ref_t + r / beta, normalised, with the mixture as the reference."""
    rng = np.random.default_rng(1)
    initial, reward = log_softmax(rng.normal(0, 1, (4, 5))), rng.uniform(0, 1, (4, 5))
    policy = jnp.asarray(initial)
    gains = reference_gains(6, weight=weight)
    for gain in gains[1:]:
        policy = jax.nn.log_softmax(mixture_log_probs(jnp.asarray(initial), policy, weight=weight) + reward)
        np.testing.assert_allclose(policy, log_softmax(initial + gain * reward), rtol=1e-3, atol=1e-4)


def test_gains_of_the_three_rules():
    np.testing.assert_array_equal(reference_gains(4, weight=1.0), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(reference_gains(4, weight=0.0), [0, 1, 1, 1, 1])
    assert reference_gains(60, weight=0.5)[-1] == pytest.approx(2.0)
