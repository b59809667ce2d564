"""Recipes of pairs and the probe that tells their sides apart, against brute force and properties of the fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.more_is_less import (
    best_worst,
    combine_sources,
    evaluate_probe,
    last_hidden,
    linear_probe,
    mahalanobis_gap,
    make_preference_pairs,
    pool_hidden,
    pool_ranked_pairs,
    self_ranked_pairs,
)


@pytest.mark.parametrize(
    ("candidates", "rewards", "expected"),
    [
        (["first", "second", "third"], [0.1, 0.9, -0.3], (1, 2)),
        (["first", "second", "third", "fourth"], [1.0, 1.0, 0.0, 0.0], (0, 2)),  # the first of equals
        (["first", "second"], [1.0, 1.0], None),  # best and worst are one answer
        (["same answer", "same answer"], [0.0, 1.0], None),
        (["  no   ", "second", "third"], [9.0, 0.0, 1.0], (2, 1)),  # two characters are left of the first
        (["abcd", "second"], [0.0, 1.0], None),
        ([], [], None),
    ],
)
def test_best_and_worst(candidates, rewards, expected):
    assert best_worst(candidates, rewards) == expected


def test_shorter_answers_may_be_let_in():
    assert best_worst(["abcd", "second"], [0.0, 1.0], min_chars=4) == (1, 0)


def test_self_ranked_pairs_stay_with_their_prompt():
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(40)]
    samples = [[f"{p}, sample {k}" if rng.random() < 0.6 else "x" for k in range(5)] for p in prompts]
    rewards = rng.normal(size=(40, 5)).tolist()
    rows = self_ranked_pairs(prompts, samples, rewards)
    usable = [p for p, texts in zip(prompts, samples) if sum(len(t) >= 5 for t in texts) >= 2]
    assert [row["prompt"] for row in rows] == usable and 0 < len(rows) < 40
    for row in rows:
        index = prompts.index(row["prompt"])
        reward = {t: r for t, r in zip(samples[index], rewards[index]) if t != "x"}
        assert row["chosen"] == max(reward, key=lambda t: reward[t])
        assert row["rejected"] == min(reward, key=lambda t: reward[t])
        assert row["chosen_source"] == row["rejected_source"] == "self"


def test_the_own_answer_is_chosen_only_above_the_stronger_one():
    assert combine_sources("own", "strong", self_reward=1.1, strong_reward=1.0) == ("own", "strong", "self", "strong")
    for reward in (1.0, 0.9):
        pair = combine_sources("own", "strong", self_reward=reward, strong_reward=1.0)
        assert pair == ("strong", "own", "strong", "self")


def test_pairs_of_two_sources():
    answers = dict(self_answers=["a", "same", " "], strong_answers=["b", "same", "c"])
    rows = pool_ranked_pairs(["p", "q", "r"], **answers, self_rewards=[2.0, 0.0, 0.0], strong_rewards=[1.0, 1.0, 1.0])
    pair = {"chosen": "a", "rejected": "b", "chosen_source": "self", "rejected_source": "strong"}
    assert rows == [{"prompt": "p", **pair}]
    rows = make_preference_pairs(
        ["p", "q"], chosen=["good", "same"], rejected=["own", "same"], chosen_source="human", rejected_source="self"
    )
    pair = {"chosen": "good", "rejected": "own", "chosen_source": "human", "rejected_source": "self"}
    assert rows == [{"prompt": "p", **pair}]


def test_pooling_reads_only_the_answer():
    hidden = np.random.default_rng(1).normal(size=(3, 4, 2))
    mask = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    spoiled = jnp.asarray(np.where(mask[..., None] == 1, hidden, np.nan), jnp.float32)
    mean, last = pool_hidden(spoiled, jnp.asarray(mask)), last_hidden(spoiled, jnp.asarray(mask))
    np.testing.assert_allclose(mean[:2], [hidden[0, :2].mean(0), hidden[1, 1:].mean(0)], rtol=1e-5)
    np.testing.assert_allclose(last[:2], [hidden[0, 1], hidden[1, 3]], rtol=1e-6)
    assert not np.any(mean[2]) and not np.any(last[2])


# The probe


def features(seed=0, count=300, shift=0.8, dimension=4):
    rng = np.random.default_rng(seed)
    direction = np.eye(dimension)[0] * shift
    return rng.normal(size=(count, dimension)) + direction, rng.normal(size=(count, dimension)) - direction


@pytest.mark.parametrize("l2", [0.001, 0.3])
def test_the_fit_is_where_the_gradient_vanishes(l2):
    chosen, rejected = features()
    weight, bias = linear_probe(chosen, rejected[:200], l2=l2)
    x, y = np.concatenate([chosen, rejected[:200]]), np.r_[np.ones(300), np.zeros(200)]
    slope = 1 / (1 + np.exp(-(x @ weight + bias))) - y
    np.testing.assert_allclose(x.T @ slope / 500 + l2 * weight, 0, atol=1e-9)
    assert slope.mean() == pytest.approx(0, abs=1e-9)  # the bias has no penalty


def test_accuracies_and_loss_against_numpy():
    chosen, rejected = features(1)
    probe = linear_probe(chosen, rejected)
    found = evaluate_probe(probe, *features(2))
    a, b = (v @ probe.weight + probe.bias for v in features(2))
    assert found.accuracy == pytest.approx((np.mean(a > 0) + np.mean(b < 0)) / 2)
    assert found.pair_accuracy == pytest.approx(np.mean(a > b))
    assert found.nll == pytest.approx((np.mean(np.log1p(np.exp(-a))) + np.mean(np.log1p(np.exp(b)))) / 2)
    # The best classifier has accuracy Phi(0.8) = 0.788 for one answer and Phi(0.8 sqrt 2) = 0.871 for a pair.
    assert found.accuracy == pytest.approx(0.788, abs=0.04) and found.pair_accuracy == pytest.approx(0.871, abs=0.05)


def test_equal_sets_cannot_be_told_apart():
    chosen, _ = features()
    probe = linear_probe(chosen, chosen)
    np.testing.assert_allclose(probe.weight, 0, atol=1e-12)
    found = evaluate_probe(probe, chosen, chosen)
    assert found == pytest.approx((0.5, 0.0, np.log(2))) and mahalanobis_gap(chosen, chosen) == 0


def test_a_shift_of_all_features_changes_nothing():
    chosen, rejected = features()
    there = evaluate_probe(linear_probe(chosen, rejected), chosen, rejected)
    moved = chosen + 1e4, rejected + 1e4
    assert evaluate_probe(linear_probe(*moved), *moved) == pytest.approx(there, abs=1e-7)
    assert mahalanobis_gap(*moved) == pytest.approx(mahalanobis_gap(chosen, rejected), rel=1e-8)


def test_the_gap_and_its_invariance():
    chosen, rejected = features(3, count=4000)
    covariance = (np.cov(chosen.T) + np.cov(rejected.T)) / 2
    d = chosen.mean(0) - rejected.mean(0)
    assert mahalanobis_gap(chosen, rejected, eps=0.0) == pytest.approx(np.sqrt(d @ np.linalg.inv(covariance) @ d))
    assert mahalanobis_gap(chosen, rejected) == pytest.approx(1.6, abs=0.1)
    linear = np.random.default_rng(4).normal(size=(4, 4))
    mapped = mahalanobis_gap(chosen @ linear, rejected @ linear, eps=0.0)
    assert mapped == pytest.approx(mahalanobis_gap(chosen, rejected, eps=0.0), rel=1e-8)
    assert mahalanobis_gap(chosen, rejected, eps=1.0) < mapped
    assert mahalanobis_gap(chosen[:, :1], rejected[:, :1]) == pytest.approx(1.6, abs=0.1)


def test_answers_of_two_models_are_separable_and_those_of_one_are_not():
    """Noisy contents, 85 % right; several models add a style that is 1 on the chosen and 0 on the rejected side."""
    rng = np.random.default_rng(5)

    def pairs(several_models):
        sign = np.where(rng.random(400) < 0.85, 1.0, -1.0)
        context = np.c_[np.ones(400), rng.normal(size=(400, 8))]
        style = np.full((400, 4), 1.0) if several_models else (rng.random((400, 4)) < 0.5).astype(float)
        other = 0 * style if several_models else style
        return np.c_[sign[:, None] * context, style], np.c_[-sign[:, None] * context, other]

    results = {several: evaluate_probe(linear_probe(*pairs(several)), *pairs(several)) for several in (False, True)}
    assert results[True].accuracy == 1.0 and results[True].nll < 0.1
    assert results[False].pair_accuracy == pytest.approx(0.85, abs=0.05) and results[False].nll > 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_worst(["answer"], []), "1 answers"),
        (lambda: best_worst(["answer"], [float("nan")]), "finite"),
        (lambda: self_ranked_pairs(["p"], [], []), "1 prompts and 0 samples"),
        (
            lambda: make_preference_pairs(["p"], chosen=["a"], rejected=[], chosen_source="a", rejected_source="b"),
            "0 rejected",
        ),
        (lambda: linear_probe(*features(), l2=0.0), "l2 is 0"),
        (lambda: linear_probe([[1.0]], [[1.0, 2.0]]), r"\(1, 1\) and \(1, 2\)"),
        (lambda: evaluate_probe(linear_probe([[1.0]], [[0.0]]), [[1.0]], [[1.0], [2.0]]), "give pairs"),
        (lambda: mahalanobis_gap([[1.0]], [[1.0], [2.0]]), "at least two"),
        (lambda: mahalanobis_gap(*features(), eps=-1.0), "eps is -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
