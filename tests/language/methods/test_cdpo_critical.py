"""cDPO on critical tokens against float64 NumPy; scores, critical tokens and selections against what they are for."""

import functools
import itertools

import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import central_differences, float32, gradients, without

from dpo_jax.language.methods.cdpo_critical import (
    CriticalToken,
    cdpo_critical_loss,
    contrastive_token_scores,
    critical_token_index,
    pass_at_k,
    select_trajectories,
)
from dpo_jax.language.methods.dpo import dpo_loss

B, T, V = 5, 6, 7
SIDES = ("chosen", "rejected")


def pairs(seed=0, spread=0.5):
    scores = np.log(np.random.default_rng([seed, 1]).uniform(0.01, 1.0, (B, T)))
    return numeric.pairs(seed, spread) | {"contrastive_rejected_logps": scores}


def without_scores(arrays):
    return without(arrays, "contrastive")


def numpy_phis(a, gamma):
    weights = dict(chosen=1.0, rejected=1 - np.exp(a["contrastive_rejected_logps"]))
    return [
        gamma * (weights[s] * (a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1)
        for s in SIDES
    ]


def numpy_cdpo(a, gamma):
    phi_w, phi_l = numpy_phis(a, gamma)
    return np.logaddexp(0.0, -(phi_w - phi_l))


@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(gamma, seed):
    arrays = pairs(seed)
    function, loss = functools.partial(numpy_cdpo, gamma=gamma), functools.partial(cdpo_critical_loss, gamma=gamma)
    output = loss(**float32(arrays))
    np.testing.assert_allclose(output.loss, function(arrays), rtol=2e-5)
    phi_w, phi_l = numpy_phis(arrays, gamma)
    np.testing.assert_allclose(output.metrics["chosen_reward"], phi_w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.metrics["rejected_reward"], phi_l, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, central_differences(function, arrays, name), rtol=1e-4, atol=1e-6)


def test_default_is_that_of_the_official_code():
    arrays = pairs(2)
    np.testing.assert_allclose(cdpo_critical_loss(**float32(arrays)).loss, numpy_cdpo(arrays, 0.1), rtol=2e-5)


def test_scores_of_zero_are_dpo():
    arrays = {**pairs(3), "contrastive_rejected_logps": np.full((B, T), -np.inf)}
    loss, dpo = functools.partial(cdpo_critical_loss, gamma=0.4), functools.partial(dpo_loss, beta=0.4)
    np.testing.assert_allclose(loss(**float32(arrays)).loss, dpo(**float32(without_scores(arrays))).loss, rtol=1e-6)
    expected = gradients(dpo, without_scores(arrays))
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-6)


def test_scores_of_one_leave_only_the_chosen_side():
    arrays, gamma = {**pairs(4), "contrastive_rejected_logps": np.zeros((B, T))}, 0.4
    gradient = gradients(functools.partial(cdpo_critical_loss, gamma=gamma), arrays)
    assert np.all(gradient["policy_rejected_logps"] == 0)
    slope = -gamma / (1 + np.exp(numpy_phis(arrays, gamma)[0]))
    expected = slope[:, None] * arrays["chosen_mask"]
    np.testing.assert_allclose(gradient["policy_chosen_logps"], expected, rtol=1e-5, atol=1e-7)


def test_start_is_log_two_with_the_weights_in_the_gradient():
    arrays, gamma = pairs(5, spread=0.0), 0.7
    np.testing.assert_allclose(cdpo_critical_loss(**float32(arrays), gamma=gamma).loss, np.log(2.0), rtol=1e-6)
    weight = (1 - np.exp(arrays["contrastive_rejected_logps"])) * arrays["rejected_mask"]
    gradient = gradients(functools.partial(cdpo_critical_loss, gamma=gamma), arrays)["policy_rejected_logps"]
    np.testing.assert_allclose(gradient, gamma / 2 * weight, rtol=1e-5, atol=1e-7)


def test_tiny_weights_keep_their_digits():
    arrays = {**pairs(6), "contrastive_rejected_logps": np.full((B, T), -1e-9)}
    weight = cdpo_critical_loss(**float32(arrays)).metrics["rejected_weight"]
    np.testing.assert_allclose(weight, 1e-9, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, float("inf")])
def test_gamma_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma is {gamma}"):
        cdpo_critical_loss(**float32(pairs()), gamma=gamma)


# Scores


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def case_of_scores(seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, scale, (B, T, V)), rng.normal(0, scale, (B, T, V)), rng.integers(0, V, (B, T))


def scores(positive, negative, labels, contrast):
    return contrastive_token_scores(
        positive_logits=jnp.asarray(positive, jnp.float32),
        negative_logits=jnp.asarray(negative, jnp.float32),
        labels=jnp.asarray(labels),
        contrast=contrast,
    )


@pytest.mark.parametrize("contrast", [0.0, 0.5, 1.0, 4.0])
def test_scores_against_float64_and_under_shifts(contrast):
    positive, negative, labels = case_of_scores()
    mixed = log_softmax((1 + contrast) * log_softmax(positive) - contrast * log_softmax(negative))
    expected = np.take_along_axis(mixed, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(scores(positive, negative, labels, contrast), expected, rtol=1e-4, atol=1e-4)
    shift = np.random.default_rng(1).normal(0, 5, (2, B, T, 1))
    shifted = scores(positive + shift[0], negative + shift[1], labels, contrast)
    np.testing.assert_allclose(shifted, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contrast", [0.0, 1.0, 7.0])
def test_scores_without_contrast_or_difference_are_the_positive_models_probabilities(contrast):
    positive, negative, labels = case_of_scores(2)
    expected = np.take_along_axis(log_softmax(positive), labels[..., None], -1)[..., 0]
    other = negative if contrast == 0 else positive
    np.testing.assert_allclose(scores(positive, other, labels, contrast), expected, rtol=1e-4, atol=1e-4)


def test_scores_are_a_distribution_over_the_vocabulary():
    positive, negative, _ = case_of_scores(3, scale=30.0)  # mixed logits of +-100 and more
    every = [scores(positive, negative, np.full((B, T), word), 1.0) for word in range(V)]
    assert np.all(np.isfinite(every)) and np.all(np.asarray(every) <= 0)
    np.testing.assert_allclose(np.exp(every).sum(0), 1.0, rtol=1e-5)


def test_words_that_are_ruled_out_and_labels_of_padding_do_no_harm():
    positive, negative, labels = case_of_scores(4)
    wide = [np.concatenate([logits, np.full((B, T, 2), -np.inf)], -1) for logits in (positive, negative)]
    np.testing.assert_allclose(
        scores(*wide, labels, 1.0), scores(positive, negative, labels, 1.0), rtol=1e-5, atol=1e-6
    )
    assert np.all(np.isfinite(scores(positive, negative, np.full((B, T), -100), 1.0)))
    with pytest.raises(ValueError, match="contrast is -1"):
        scores(positive, negative, labels, -1.0)


@pytest.mark.parametrize("contrast", [0.5, 2.0])
def test_contrast_of_two_gaussians_moves_the_mean_and_keeps_the_variance(contrast):
    x = np.linspace(-40, 40, 4001)
    positive, negative = -((x - 1.0) ** 2) / 8, -((x + 2.0) ** 2) / 8  # standard deviation 2
    labels = np.arange(x.size)[:, None]
    repeated = [np.broadcast_to(logits, (x.size, 1, x.size)) for logits in (positive, negative)]
    every = labels[::40]
    p = np.exp(np.asarray(scores(*(r[::40] for r in repeated), every, contrast), np.float64))[:, 0]
    expected = -((x[::40] - (1.0 + contrast * 3.0)) ** 2) / 8
    np.testing.assert_allclose(p / p.max(), np.exp(expected - expected.max()), atol=1e-3)


# Critical tokens


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([], CriticalToken(None, False)),
        ([64, 30, 2], CriticalToken(None, False)),
        ([64, 0, 0, 0], CriticalToken(1, True)),
        ([64, 0, 3, 0], CriticalToken(1, True)),  # 3 of 64 is below 5 %
        ([64, 0, 4, 0], CriticalToken(3, True)),  # 4 of 64 is not
        ([64, 0, 4, 1], CriticalToken(1, False)),
        ([0, 9, 0, 9, 2], CriticalToken(2, False)),
        ([5, 0], CriticalToken(1, True)),
    ],
    ids=str,
)
def test_critical_token(counts, expected):
    assert critical_token_index(counts, num_rollouts=64) == expected


def test_critical_token_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.choice([0, 0, 1, 3, 4, 30], size=rng.integers(0, 9)).tolist()
        hopeless = [
            t for t, count in enumerate(counts) if count == 0 and all(later / 64 < 0.05 for later in counts[t + 1 :])
        ]
        found = critical_token_index(counts, num_rollouts=64)
        assert found.strict == bool(hopeless)
        if hopeless:
            assert found.index == hopeless[0]
        elif found.index is not None:
            assert counts[found.index] == 0 and any(later >= 4 for later in counts[found.index + 1 :])
        else:
            assert 0 not in counts


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([65], dict(num_rollouts=64), r"correct_counts\[0\] is 65"),
        ([0, -1], dict(num_rollouts=64), r"correct_counts\[1\] is -1"),
        ([0], dict(num_rollouts=0), "num_rollouts is 0"),
        ([0], dict(num_rollouts=8, tolerance=0.0), "tolerance is 0"),
        ([0], dict(num_rollouts=8, tolerance=1.5), "tolerance is 1.5"),
    ],
)
def test_impossible_rollouts_are_refused(counts, options, message):
    with pytest.raises(ValueError, match=message):
        critical_token_index(counts, **options)


def test_pass_at_k_counts_subsets():
    for n, c, k in [(6, 2, 1), (6, 2, 3), (6, 5, 2), (6, 0, 4), (6, 3, 6), (6, 6, 1)]:
        draws = list(itertools.combinations(range(n), k))
        expected = sum(any(item < c for item in draw) for draw in draws) / len(draws)
        assert pass_at_k(num_samples=n, num_correct=c, k=k) == pytest.approx(expected, abs=1e-12)
    for options in (dict(num_samples=4, num_correct=5, k=1), dict(num_samples=4, num_correct=1, k=0)):
        with pytest.raises(ValueError, match=r"is [05]; give"):
            pass_at_k(**options)


# Selection


def select(text, right, **options):
    """One letter per solution, '-' for none; letters in `right` are right."""
    answers = [None if letter == "-" else letter for letter in text]
    return select_trajectories(answers, [letter in right for letter in text], **options)


@pytest.mark.parametrize(
    ("text", "right", "top_p", "expected"),
    [
        ("xaabbbx", "x", 0.5, ((0,), (3,), (0, 3))),  # budget 3 of 5 wrong ones: b takes it all
        ("xaabbbcx", "x", 0.9, ((0,), (3, 1), (0, 3))),  # budget 6: b, a; c occurs once
        ("xabc", "x", 1.0, ((0,), (1,), (0, 1))),  # the first one may occur once
        ("aab", "", 0.5, ((), (0,), None)),
        ("-xx", "x", 0.5, ((1,), (), None)),
        ("--", "", 0.5, ((), (), None)),
        ("abab", "", 0.5, ((), (0,), None)),  # ties: the one seen first; a covers the budget of 2
        ("xaab", "x", 0.0, ((0,), (), (0, 1))),
        ("yxxab", "xy", 0.5, ((1,), (3,), (1, 3))),  # the most frequent right answer
    ],
)
def test_selection(text, right, top_p, expected):
    assert select(text, right, top_p=top_p) == expected


def test_budget_is_not_fooled_by_rounding():
    hundred = "a" * 7 + "b" * 5 + "".join(chr(1000 + i) for i in range(88))
    assert len(select(hundred, "", top_p=0.07).negative) == 1  # 0.07 * 100 > 7 in floating point


def test_impossible_selections_are_refused():
    with pytest.raises(ValueError, match="2 answers but 1 judgements"):
        select_trajectories([1, 2], [True])
    with pytest.raises(ValueError, match="answer 7 is judged both"):
        select_trajectories([7, 7], [True, False])
    with pytest.raises(ValueError, match=r"top_p is 1\.5"):
        select("ab", "a", top_p=1.5)
