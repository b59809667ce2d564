"""EXO, NCA, APO, DiscoPOP, AOT, BCO and MPO on pairs against float64 NumPy, and what their papers promise."""

import functools
from typing import Any

import numpy as np
import pytest
from numeric import (
    assert_formula,
    float32,
    gradients,
    pairs,
    scalar_pair,
    sigmoid,
    slope,
    softplus,
    sums,
    with_empty_rows,
)

from dpo_jax.language.methods.dpo import cdpo_loss, dpo_loss
from dpo_jax.language.methods.dpo_variants import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    exo_pair_loss,
    mpo_loss,
    nca_pair_loss,
)

LOG2 = np.log(2.0)


def rewards(a, beta):
    _, u, _, _, v, _ = sums(a)
    return beta * u, beta * v


def numpy_exo(arrays, beta, label_smoothing):
    a, b = rewards(arrays, beta)
    p = np.stack([sigmoid(a - b), sigmoid(b - a)])
    target = np.array([1 - label_smoothing, label_smoothing])[:, None]
    return (p * np.log(p / target)).sum(0)


def numpy_nca(arrays, beta):
    a, b = rewards(arrays, beta)
    return -np.log(sigmoid(a)) - 0.5 * np.log(sigmoid(-a)) - 0.5 * np.log(sigmoid(-b))


def numpy_apo_zero(arrays, beta):
    a, b = rewards(arrays, beta)
    return 1 - sigmoid(a) + sigmoid(b)


def numpy_apo_down(arrays, beta):
    a, b = rewards(arrays, beta)
    return sigmoid(a) + 1 - sigmoid(a - b)


def numpy_discopop(arrays, beta, tau):
    a, b = rewards(arrays, beta)
    g = sigmoid((a - b) / tau)
    return (1 - g) * softplus(b - a) + g * np.exp(b - a)


def numpy_bco(arrays, beta, reward_shift):
    a, b = rewards(arrays, beta)
    return -np.log(sigmoid(a - reward_shift)) - np.log(1 - sigmoid(b - reward_shift))


def numpy_mpo(arrays, beta, preference_coef, quality_coef, generation_coef, reward_shift):
    a, b = rewards(arrays, beta)
    s_w, _, length, _, _, _ = sums(arrays)
    nll = -s_w * len(s_w) / length.sum()
    quality = numpy_bco(arrays, beta, reward_shift)
    return preference_coef * softplus(b - a) + quality_coef * quality + generation_coef * nll


def smoothed(x, label_smoothing):
    return (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


def by_rank(own, other):
    """own_(k) - other_(k) for each rank k, on the row that holds rank k of own."""
    gap = np.empty_like(own)
    gap[np.argsort(own)] = np.sort(own) - np.sort(other)
    return gap


def numpy_aot(arrays, beta, label_smoothing):
    s_w, u, _, s_l, v, _ = sums(arrays)
    return smoothed(beta * by_rank(s_w - s_l, (s_w - u) - (s_l - v)), label_smoothing)


def numpy_aot_unpaired(arrays, beta, label_smoothing):
    _, u, _, _, v, _ = sums(arrays)
    return smoothed(beta * by_rank(u, v), label_smoothing)


MPO = dict(beta=0.7, preference_coef=0.5, quality_coef=0.3, generation_coef=0.9, reward_shift=0.4)
MEMBERS = [
    (exo_pair_loss, numpy_exo, dict(beta=0.5, label_smoothing=1e-3)),
    (exo_pair_loss, numpy_exo, dict(beta=2.0, label_smoothing=0.3)),
    (nca_pair_loss, numpy_nca, dict(beta=0.8)),
    (apo_zero_loss, numpy_apo_zero, dict(beta=0.8)),
    (apo_down_loss, numpy_apo_down, dict(beta=0.8)),
    (discopop_loss, numpy_discopop, dict(beta=0.05, tau=0.05)),
    (discopop_loss, numpy_discopop, dict(beta=0.6, tau=1.0)),
    (bco_pair_loss, numpy_bco, dict(beta=0.8, reward_shift=0.0)),
    (bco_pair_loss, numpy_bco, dict(beta=0.8, reward_shift=-1.3)),
    (mpo_loss, numpy_mpo, MPO),
    (aot_loss, numpy_aot, dict(beta=0.5, label_smoothing=0.0)),
    (aot_loss, numpy_aot, dict(beta=0.5, label_smoothing=0.2)),
    (aot_unpaired_loss, numpy_aot_unpaired, dict(beta=0.5, label_smoothing=0.0)),
    (aot_unpaired_loss, numpy_aot_unpaired, dict(beta=0.5, label_smoothing=0.2)),
]
IDS = [f"{loss.__name__}-{'-'.join(map(str, options.values()))}" for loss, _, options in MEMBERS]


@pytest.mark.parametrize(("loss", "formula", "options"), MEMBERS, ids=IDS)
def test_value_and_gradient_against_the_formula(loss, formula, options):
    assert_formula(loss, functools.partial(formula, **options), pairs(), **options)


def test_defaults_are_the_papers():
    arrays = pairs()
    for loss, formula, options in [
        (exo_pair_loss, numpy_exo, dict(beta=0.5, label_smoothing=1e-3)),
        (nca_pair_loss, numpy_nca, dict(beta=0.01)),
        (apo_zero_loss, numpy_apo_zero, dict(beta=0.1)),
        (apo_down_loss, numpy_apo_down, dict(beta=0.1)),
        (discopop_loss, numpy_discopop, dict(beta=0.05, tau=0.05)),
        (bco_pair_loss, numpy_bco, dict(beta=0.01, reward_shift=0.0)),
        (aot_loss, numpy_aot, dict(beta=0.01, label_smoothing=0.0)),
        (aot_unpaired_loss, numpy_aot_unpaired, dict(beta=0.01, label_smoothing=0.0)),
        (
            mpo_loss,
            numpy_mpo,
            dict(beta=0.1, preference_coef=0.8, quality_coef=0.2, generation_coef=1.0, reward_shift=0.0),
        ),
    ]:
        np.testing.assert_allclose(loss(**float32(arrays)).loss, formula(arrays, **options), rtol=2e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (exo_pair_loss, 0.5 * np.log(1 / (4e-3 * (1 - 1e-3)))),
        (nca_pair_loss, 2 * LOG2),
        (apo_zero_loss, 1.0),
        (apo_down_loss, 1.0),
        (discopop_loss, 0.5 * (LOG2 + 1)),
        (aot_loss, LOG2),
        (aot_unpaired_loss, LOG2),
        (bco_pair_loss, 2 * LOG2),
    ],
)
def test_values_where_policy_is_reference(loss, expected, beta):
    arrays = pairs()
    for side in ("chosen", "rejected"):
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"]
    np.testing.assert_allclose(loss(**float32(arrays), beta=beta).loss, expected, rtol=1e-5)


# EXO


@pytest.mark.parametrize("label_smoothing", [1e-3, 0.2])
def test_exo_is_zero_at_the_log_odds_and_its_slope_has_a_closed_form(label_smoothing):
    optimum = np.log((1 - label_smoothing) / label_smoothing)
    options: dict[str, Any] = dict(beta=1.0, label_smoothing=label_smoothing)
    assert abs(float(exo_pair_loss(**scalar_pair(optimum), **options).loss[0])) < 1e-6
    x = np.array([-6.0, -1.0, 0.0, optimum, optimum + 2])
    expected = sigmoid(x) * sigmoid(-x) * (x - optimum)
    np.testing.assert_allclose(slope(exo_pair_loss, scalar_pair(x), **options), expected, rtol=1e-3, atol=1e-6)


def test_exo_gives_up_badly_wrong_pairs_and_dpo_does_not():
    far = scalar_pair(-40.0)
    assert abs(slope(exo_pair_loss, far, beta=1.0)[0]) < 1e-10
    assert slope(dpo_loss, far, beta=1.0)[0] == pytest.approx(-1.0)


def test_exo_is_the_kl_divergence_of_the_official_target_up_to_its_normalisation():
    e = np.exp(-10.0)  # the official code's target is (1, e^-10), which does not add up to 1
    arrays = pairs(2)
    a, b = rewards(arrays, 0.5)
    p = sigmoid(a - b)
    official = p * np.log(p) + (1 - p) * (np.log(1 - p) + 10)
    ours = exo_pair_loss(**float32(arrays), beta=0.5, label_smoothing=e).loss
    np.testing.assert_allclose(ours, official - p * np.log1p(-e), rtol=1e-5)
    assert np.abs(p * np.log1p(-e)).max() < 4.6e-5


# Pointwise members


@pytest.mark.parametrize(("loss", "beta"), [(nca_pair_loss, 0.5), (apo_zero_loss, 0.5), (bco_pair_loss, 0.5)])
def test_the_rejected_gradient_of_pointwise_members_does_not_see_the_chosen_answer(loss, beta):
    arrays = pairs()
    other = {**arrays, "policy_chosen_logps": arrays["policy_chosen_logps"] - 0.7}

    def of(inputs):
        return gradients(lambda **a: loss(**a, beta=beta), inputs)["policy_rejected_logps"]

    np.testing.assert_array_equal(of(arrays), of(other))
    pairwise = [gradients(dpo_loss, inputs)["policy_rejected_logps"] for inputs in (arrays, other)]
    assert np.abs(pairwise[0] - pairwise[1]).max() > 1e-3


def test_nca_rests_at_log_two_for_the_chosen_and_nowhere_for_the_rejected():
    before, at, after = slope(nca_pair_loss, scalar_pair([LOG2 - 0.1, LOG2, LOG2 + 0.1]), beta=1.0)
    assert before < 0 < after and abs(at) < 1e-6
    assert np.all(slope(nca_pair_loss, scalar_pair(0.0, [-8.0, 0.0, 8.0]), "rejected", beta=1.0) > 0)


@pytest.mark.parametrize("loss", [apo_zero_loss, apo_down_loss])
def test_apo_lies_between_zero_and_two(loss):
    u, v = np.meshgrid([-30.0, -2.0, 0.0, 2.0, 30.0], [-30.0, -2.0, 0.0, 2.0, 30.0])
    values = np.asarray(loss(**scalar_pair(u.ravel(), v.ravel()), beta=0.3).loss)
    assert np.all((values > 0) & (values < 2))


def test_apo_moves_likelihoods_where_the_names_say():
    here = scalar_pair(0.0)
    zero = slope(apo_zero_loss, here)[0], slope(apo_zero_loss, here, "rejected")[0]
    assert zero[0] < 0 < zero[1]
    # Down: at a small margin the two terms balance for the chosen; at a large one only the first is left.
    wide = scalar_pair(0.0, -60.0)
    assert slope(apo_down_loss, here)[0] == 0 and slope(apo_down_loss, wide)[0] > 0
    assert slope(apo_down_loss, here, "rejected")[0] > 0


def test_bco_shift_moves_the_rewards():
    shifted = bco_pair_loss(**scalar_pair(3.0, -1.0), beta=0.5, reward_shift=0.5).loss
    np.testing.assert_allclose(shifted, bco_pair_loss(**scalar_pair(2.0, -2.0), beta=0.5).loss, rtol=1e-6)


# DiscoPOP


def test_discopop_is_not_monotone():
    values = discopop_loss(**scalar_pair([-0.1186, 0.0720]), beta=1.0).loss
    np.testing.assert_allclose(values, [0.7859, 0.8783], atol=5e-5)
    slopes = slope(discopop_loss, scalar_pair([-0.13, -0.1186, 0.0, 0.0720, 0.09]), beta=1.0)
    assert slopes[0] < 0 < slopes[2] and slopes[4] < 0
    np.testing.assert_allclose(slopes[1:4], [0.0, 0.784, 0.0], atol=3e-3)
    at_defaults = slope(discopop_loss, scalar_pair([-2.371, 1.440]))  # beta = tau = 0.05
    np.testing.assert_allclose(at_defaults, 0.0, atol=1e-4)


def test_discopop_is_logistic_far_below_and_exponential_far_above():
    far = discopop_loss(**scalar_pair([-1e4, -90.0, 5.0, 60.0]), beta=1.0).loss
    np.testing.assert_allclose(far, [1e4, 90.0, np.exp(-5.0), np.exp(-60.0)], rtol=1e-5)


# AOT


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_aot_of_one_pair_is_dpo(loss):
    arrays = float32(pairs(rows=1))
    for smoothing in (0.0, 0.3):
        expected = cdpo_loss(**arrays, beta=0.4, label_smoothing=smoothing).loss
        actual = loss(**arrays, beta=0.4, label_smoothing=smoothing).loss
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_aot_differs_from_dpo_on_a_batch():
    arrays = float32(pairs())
    for loss in (aot_loss, aot_unpaired_loss):
        assert np.abs(loss(**arrays, beta=0.5).loss - dpo_loss(**arrays, beta=0.5).loss).max() > 0.05


def test_aot_unpaired_does_not_know_the_pairing():
    arrays = pairs()
    order = np.array([2, 0, 4, 1, 3])
    mixed = {name: value[order] if "rejected" in name else value for name, value in arrays.items()}
    expected = aot_unpaired_loss(**float32(arrays), beta=0.5).loss
    np.testing.assert_allclose(aot_unpaired_loss(**float32(mixed), beta=0.5).loss, expected, rtol=1e-6)
    assert np.abs(aot_loss(**float32(mixed), beta=0.5).loss - aot_loss(**float32(arrays), beta=0.5).loss).max() > 0.05


def test_aot_unpaired_of_sides_in_one_order_is_dpo():
    inputs = scalar_pair([0.5, -1.0, 3.0, 0.1], [-0.2, -0.4, 7.0, -0.3])
    np.testing.assert_allclose(aot_unpaired_loss(**inputs, beta=0.5).loss, dpo_loss(**inputs, beta=0.5).loss, rtol=1e-6)


def test_aot_does_not_see_a_constant_of_the_prompt():
    arrays = pairs()
    shifted = {**arrays}
    for side in ("chosen", "rejected"):
        shifted[f"policy_{side}_logps"] = arrays[f"policy_{side}_logps"].copy()
        shifted[f"policy_{side}_logps"][:, 0] += np.linspace(-3, 3, 5)  # the first token is never masked
    before, after = (aot_loss(**float32(a), beta=0.5).loss for a in (arrays, shifted))
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "formula"), [(aot_loss, numpy_aot), (aot_unpaired_loss, numpy_aot_unpaired)])
def test_aot_leaves_empty_places_out_wherever_they_stand(loss, formula):
    arrays, options = pairs(3), dict(beta=0.5, label_smoothing=0.1)
    padded = with_empty_rows(arrays, [0, 2, 2, 5])
    there = padded["chosen_mask"].any(-1)
    output = loss(**float32(padded), **options)
    np.testing.assert_allclose(output.loss[there], formula(arrays, **options), rtol=3e-5)
    np.testing.assert_array_equal(output.loss[~there], 0.0)
    np.testing.assert_array_equal(output.metrics["quantile_margin"][~there], 0.0)
    for name, gradient in gradients(lambda **a: loss(**a, **options), padded).items():
        plain = gradients(lambda **a: loss(**a, **options), arrays)[name]
        np.testing.assert_allclose(gradient[there], plain, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(gradient[~there], 0.0)


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
def test_aot_with_ties_keeps_the_mean(loss):
    arrays = {name: np.repeat(value, 2, axis=0) for name, value in pairs(4).items()}
    once = loss(**float32(pairs(4)), beta=0.5).loss.mean()
    assert loss(**float32(arrays), beta=0.5).loss.mean() == pytest.approx(float(once), rel=1e-5)


# MPO


def test_mpo_is_made_of_its_three_parts():
    arrays = float32(pairs())
    off: dict[str, Any] = dict(preference_coef=0.0, quality_coef=0.0, generation_coef=0.0)
    np.testing.assert_allclose(
        mpo_loss(**arrays, **{**off, "preference_coef": 1.0}).loss, dpo_loss(**arrays).loss, rtol=1e-6
    )
    quality = mpo_loss(**arrays, **{**off, "quality_coef": 1.0}, reward_shift=0.3).loss
    np.testing.assert_allclose(quality, bco_pair_loss(**arrays, beta=0.1, reward_shift=0.3).loss, rtol=1e-6)
    s_w, _, length, _, _, _ = sums(pairs())
    generation = mpo_loss(**arrays, **{**off, "generation_coef": 1.0}).loss.mean()
    assert float(generation) == pytest.approx(-s_w.sum() / length.sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (exo_pair_loss, "label_smoothing", 0.0),
        (exo_pair_loss, "label_smoothing", 0.6),
        (exo_pair_loss, "beta", 0.0),
        (discopop_loss, "tau", 0.0),
        (discopop_loss, "tau", 1.5),
        (discopop_loss, "tau", float("nan")),
        (aot_loss, "label_smoothing", 0.6),
        (aot_unpaired_loss, "beta", float("inf")),
        (bco_pair_loss, "reward_shift", float("inf")),
        (mpo_loss, "preference_coef", -0.1),
        (mpo_loss, "quality_coef", float("nan")),
        (mpo_loss, "generation_coef", -1.0),
        (mpo_loss, "reward_shift", float("nan")),
    ],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(pairs()), **{name: value})
