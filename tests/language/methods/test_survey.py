"""Members of the survey against float64 NumPy, their limits and properties; the taxonomy."""

import functools
import re
from typing import Any

import jax
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
    without,
)

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.survey import (
    TAXONOMY,
    cal_dpo_loss,
    chi_po_loss,
    dpop_loss,
    dr_dpo_loss,
    groups_of,
    npo_loss,
    odpo_identity_loss,
    odpo_loss,
    rrhf_pair_loss,
    slic_loss,
)

LOG2 = np.log(2.0)


def free(seed=0):
    """Pairs without a reference."""
    return without(pairs(seed), "reference")


def scored(seed=0):
    """Pairs with scores; the gap of row 1 is negative and that of row 3 is zero."""
    rng = np.random.default_rng([seed, 1])
    rejected = rng.normal(0, 1, 5)
    gap = rng.uniform(0.1, 3.0, 5) * [1, -1, 1, 0, 1]
    return {**pairs(seed), "chosen_score": rejected + gap, "rejected_score": rejected}


def numpy_dpo(a, beta):
    _, u, _, _, v, _ = sums(a)
    return softplus(-beta * (u - v))


def numpy_dpop(a, beta, penalty_coef):
    _, u, _, _, v, _ = sums(a)
    return softplus(-beta * (u - v - penalty_coef * np.maximum(0, -u)))


def numpy_cal_dpo(a, beta, calibration_coef):
    _, u, _, _, v, _ = sums(a)
    return softplus(v - u) + calibration_coef * ((u - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2)


def numpy_odpo(a, beta, alpha):
    _, u, _, _, v, _ = sums(a)
    gap = a["chosen_score"] - a["rejected_score"]
    above = gap > 0
    return np.where(above, softplus(-(beta * (u - v) - alpha * np.log(np.where(above, gap, 1)))), 0)


def numpy_odpo_identity(a, beta, alpha):
    _, u, _, _, v, _ = sums(a)
    return softplus(-(beta * (u - v) - alpha * (a["chosen_score"] - a["rejected_score"])))


def numpy_chi_po(a, beta, reward_bound):
    _, u, _, _, v, _ = sums(a)
    h = beta * (np.exp(u) + u - np.exp(v) - v)
    return softplus(-np.clip(h, -2 * reward_bound, 2 * reward_bound))


def numpy_slic(a, delta, nll_coef):
    s_w, _, _, s_l, _, _ = sums(a)
    return np.maximum(0, delta - s_w + s_l) - nll_coef * s_w


def numpy_rrhf(a, nll_coef):
    s_w, _, chosen_length, s_l, _, rejected_length = sums(a)
    m_w, m_l = s_w / chosen_length, s_l / rejected_length
    return np.maximum(0, m_l - m_w) - nll_coef * m_w


def numpy_npo(a, beta):
    v = ((a["policy_rejected_logps"] - a["reference_rejected_logps"]) * a["rejected_mask"]).sum(-1)
    return 2 / beta * softplus(beta * v)


def numpy_dr_dpo(a, beta, beta_prime):
    number = -beta_prime * np.log(np.exp(-numpy_dpo(a, beta) / beta_prime).mean())
    return np.full(len(a["chosen_mask"]), number)


def rejected_side(seed=0):
    return {name: value for name, value in pairs(seed).items() if "rejected" in name}


INFINITY = float("inf")
MEMBERS = [
    (dpop_loss, numpy_dpop, pairs(), dict(beta=0.3, penalty_coef=2.0)),
    (cal_dpo_loss, numpy_cal_dpo, pairs(), dict(beta=0.4, calibration_coef=0.5)),
    (odpo_loss, numpy_odpo, scored(), dict(beta=0.5, alpha=0.7)),
    (odpo_identity_loss, numpy_odpo_identity, scored(), dict(beta=0.5, alpha=0.7)),
    (chi_po_loss, numpy_chi_po, pairs(), dict(beta=0.3, reward_bound=INFINITY)),
    (chi_po_loss, numpy_chi_po, pairs(), dict(beta=0.3, reward_bound=0.2)),
    (slic_loss, numpy_slic, free(), dict(delta=2.0, nll_coef=0.3)),
    (rrhf_pair_loss, numpy_rrhf, free(), dict(nll_coef=0.4)),
    (npo_loss, numpy_npo, rejected_side(), dict(beta=0.6)),
    (dr_dpo_loss, numpy_dr_dpo, pairs(), dict(beta=0.5, beta_prime=0.3)),
]
IDS = [f"{loss.__name__}-{'-'.join(map(str, options.values()))}" for loss, _, _, options in MEMBERS]


@pytest.mark.parametrize(("loss", "formula", "arrays", "options"), MEMBERS, ids=IDS)
def test_value_and_gradient_against_the_formula(loss, formula, arrays, options):
    assert_formula(loss, functools.partial(formula, **options), arrays, **options)


@pytest.mark.parametrize(
    ("loss", "formula", "arrays", "options"),
    [
        (dpop_loss, numpy_dpop, pairs(1), dict(beta=0.3, penalty_coef=50.0)),
        (cal_dpo_loss, numpy_cal_dpo, pairs(1), dict(beta=0.001, calibration_coef=0.5)),
        (odpo_loss, numpy_odpo, scored(1), dict(beta=0.1, alpha=1.0)),
        (odpo_identity_loss, numpy_odpo_identity, scored(1), dict(beta=0.1, alpha=1.0)),
        (chi_po_loss, numpy_chi_po, pairs(1), dict(beta=0.01, reward_bound=INFINITY)),
        (slic_loss, numpy_slic, free(1), dict(delta=1.0, nll_coef=0.1)),
        (rrhf_pair_loss, numpy_rrhf, free(1), dict(nll_coef=1.0)),
        (npo_loss, numpy_npo, rejected_side(1), dict(beta=0.1)),
        (dr_dpo_loss, numpy_dr_dpo, pairs(1), dict(beta=0.1, beta_prime=1.0)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_are_the_papers(loss, formula, arrays, options):
    np.testing.assert_allclose(loss(**float32(arrays)).loss, formula(arrays, **options), rtol=2e-5, atol=1e-6)


# DPOP


def test_dpop_is_dpo_without_penalty_or_shortfall():
    arrays = float32(pairs())
    np.testing.assert_array_equal(
        dpop_loss(**arrays, beta=0.5, penalty_coef=0.0).loss, dpo_loss(**arrays, beta=0.5).loss
    )
    above = scalar_pair([0.0, 0.4, 3.0], -0.5)
    np.testing.assert_array_equal(dpop_loss(**above, beta=0.5).loss, dpo_loss(**above, beta=0.5).loss)


def test_dpop_pulls_the_chosen_answer_up_by_one_plus_lambda():
    u, v, penalty_coef = -0.4, -1.0, 3.0
    options: dict[str, Any] = dict(beta=0.5, penalty_coef=penalty_coef)
    inputs = scalar_pair(u, v)
    # A DPO pair with the same logit as this one after the penalty.
    equal = scalar_pair(u + penalty_coef * u, v)
    chosen, rejected = (slope(dpop_loss, inputs, side, **options)[0] for side in ("chosen", "rejected"))
    assert chosen == pytest.approx((1 + penalty_coef) * slope(dpo_loss, equal, beta=0.5)[0], rel=1e-5)
    assert rejected == pytest.approx(slope(dpo_loss, equal, "rejected", beta=0.5)[0], rel=1e-5)
    assert float(dpop_loss(**inputs, **options).metrics["penalty"][0]) == pytest.approx(0.5 * 3 * 0.4, rel=1e-6)


# Cal-DPO


@pytest.mark.parametrize("beta", [0.001, 0.5])
def test_cal_dpo_without_calibration_is_dpo_at_beta_one(beta):
    arrays = float32(pairs())
    actual = cal_dpo_loss(**arrays, beta=beta, calibration_coef=0.0).loss
    np.testing.assert_array_equal(actual, dpo_loss(**arrays, beta=1.0).loss)


def test_cal_dpo_draws_rewards_to_one_half():
    inputs = scalar_pair(5.0, -5.0)  # beta 0.1: the targets
    output = cal_dpo_loss(**inputs, beta=0.1)
    assert float(output.metrics["calibration_error"][0]) == pytest.approx(0.0, abs=1e-9)
    assert float(output.metrics["margin"][0]) == pytest.approx(1.0, rel=1e-6)
    slopes = slope(cal_dpo_loss, scalar_pair([4.0, 6.0], -5.0), beta=0.1)
    assert slopes[0] < 0 < slopes[1]


# ODPO


def test_odpo_without_weight_is_dpo_where_the_scores_agree_with_the_labels():
    arrays = scored()
    above = arrays["chosen_score"] > arrays["rejected_score"]
    expected = dpo_loss(**float32(pairs()), beta=0.5).loss
    np.testing.assert_allclose(odpo_loss(**float32(arrays), beta=0.5, alpha=0.0).loss, above * expected, rtol=1e-6)
    np.testing.assert_allclose(odpo_identity_loss(**float32(arrays), beta=0.5, alpha=0.0).loss, expected, rtol=1e-6)


def test_odpo_of_unordered_scores_is_the_limit_of_a_vanishing_gap():
    arrays = scored()
    output = odpo_loss(**float32(arrays), beta=0.5)
    np.testing.assert_array_equal(output.metrics["scored_above"], [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(output.loss[np.array([1, 3])], 0.0)
    gradient = gradients(functools.partial(odpo_loss, beta=0.5), arrays)["policy_chosen_logps"]
    np.testing.assert_array_equal(np.any(gradient != 0, axis=-1), [True, False, True, False, True])
    inputs = scalar_pair(np.zeros(3)) | float32(
        dict(chosen_score=np.array([1e-2, 1e-4, 1e-30]), rejected_score=np.zeros(3))
    )
    np.testing.assert_allclose(odpo_loss(**inputs).loss, [1e-2, 1e-4, 1e-30], rtol=1e-2)


def test_odpo_offsets_move_the_margin():
    inputs = scalar_pair([2.0, 5.0], 1.0)
    scores = float32(dict(chosen_score=np.array([4.0, 4.0]), rejected_score=np.array([1.0, 1.0])))
    x = 0.5 * np.array([1.0, 4.0])
    np.testing.assert_allclose(odpo_loss(**inputs, **scores, beta=0.5).loss, softplus(np.log(3) - x), rtol=1e-5)
    fixed = odpo_identity_loss(**inputs, **scores, beta=0.5, alpha=0.2)
    np.testing.assert_allclose(fixed.loss, softplus(0.6 - x), rtol=1e-5)
    np.testing.assert_allclose(fixed.metrics["offset"], 0.6, rtol=1e-6)


# chi-PO


def test_chi_po_is_dpo_where_both_answers_are_unlikely_and_steeper_elsewhere():
    unlikely = scalar_pair([-31.0, -25.0], [-30.0, -33.0])
    np.testing.assert_allclose(chi_po_loss(**unlikely, beta=0.3).loss, dpo_loss(**unlikely, beta=0.3).loss, rtol=1e-6)
    u = np.array([-3.0, 0.0, 2.0])
    output = chi_po_loss(**scalar_pair(u, -0.5), beta=0.1)
    steepness = slope(chi_po_loss, scalar_pair(u, -0.5), beta=0.1) / (
        -0.1 * sigmoid(-np.asarray(output.metrics["margin"]))
    )
    np.testing.assert_allclose(steepness, 1 + np.exp(u), rtol=1e-5)


def test_chi_po_stops_the_exponential_at_twenty_and_the_margin_at_its_bound():
    inputs = scalar_pair([20.0, 40.0, 1e4], 0.0)
    reward = chi_po_loss(**inputs, beta=1e-6).metrics["chosen_reward"]
    np.testing.assert_allclose(reward, 1e-6 * (np.exp(20.0) + np.array([20.0, 40.0, 1e4])), rtol=1e-6)
    slopes = slope(chi_po_loss, scalar_pair([-50.0, 0.1, 1.0], 0.0), beta=0.5, reward_bound=0.3)
    output = chi_po_loss(**scalar_pair([-50.0, 0.1, 1.0], 0.0), beta=0.5, reward_bound=0.3)
    np.testing.assert_array_equal(output.metrics["clipped"], [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(slopes != 0, [False, True, False])
    assert float(output.loss[0]) == pytest.approx(softplus(0.6), rel=1e-6)


# SLiC and RRHF


@pytest.mark.parametrize(("loss", "met"), [(slic_loss, [0.9, 1.1]), (rrhf_pair_loss, [-0.1, 0.1])])
def test_the_hinge_ends_where_the_margin_is_met(loss, met):
    inputs = without(scalar_pair(met), "reference")
    np.testing.assert_array_equal(slope(loss, inputs, "rejected"), [1.0, 0.0])
    np.testing.assert_array_equal(slope(loss, inputs, nll_coef=0.0), [-1.0, 0.0])
    np.testing.assert_allclose(slope(loss, inputs, nll_coef=0.4), [-1.4, -0.4], rtol=1e-6)


def test_rrhf_ranks_by_log_probability_per_token_and_slic_by_the_sum():
    inputs = {name: np.ones((1, 4)) for name in ("chosen_mask", "rejected_mask")}
    inputs["rejected_mask"] = np.array([[1.0, 0, 0, 0]])
    inputs |= dict(policy_chosen_logps=np.full((1, 4), -1.0), policy_rejected_logps=np.full((1, 4), -2.0))
    rrhf, slic = (loss(**float32(inputs), nll_coef=0.0) for loss in (rrhf_pair_loss, slic_loss))
    assert float(rrhf.loss[0]) == 0 and float(rrhf.metrics["accuracy"][0]) == 1
    assert float(slic.loss[0]) == 3 and float(slic.metrics["accuracy"][0]) == 0


# NPO


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_at_the_reference_and_its_slope(beta):
    v = np.array([-30.0, -1.0, 0.0, 4.0])
    inputs = {name: value for name, value in scalar_pair(0.0, v).items() if "rejected" in name}
    loss = functools.partial(npo_loss, beta=beta)
    assert float(loss(**inputs).loss[2]) == pytest.approx(2 / beta * LOG2, rel=1e-6)
    np.testing.assert_allclose(slope(loss, inputs, "rejected"), 2 * sigmoid(beta * v), rtol=1e-4)


def test_npo_tends_to_gradient_ascent_on_the_nll():
    arrays = rejected_side()
    gradient = gradients(functools.partial(npo_loss, beta=1e-4), arrays)["policy_rejected_logps"]
    np.testing.assert_allclose(gradient, arrays["rejected_mask"], atol=1e-3)  # d log pi(y) / d logps


# Dr. DPO


def test_dr_dpo_is_the_batch_mean_of_dpo_at_a_large_temperature_and_its_minimum_at_a_small_one():
    arrays = float32(pairs())
    plain = dpo_loss(**arrays, beta=0.5).loss
    np.testing.assert_allclose(dr_dpo_loss(**arrays, beta=0.5, beta_prime=1e3).loss, plain.mean(), rtol=1e-3)
    np.testing.assert_allclose(dr_dpo_loss(**arrays, beta=0.5, beta_prime=1e-4).loss, plain.min(), rtol=1e-2)
    values = [float(dr_dpo_loss(**arrays, beta=0.5, beta_prime=t).loss[0]) for t in (0.05, 0.5, 5.0)]
    assert values == sorted(values) and values[-1] < plain.mean()


def test_dr_dpo_weighs_pairs_by_the_metric():
    arrays = pairs()
    options: dict[str, Any] = dict(beta=0.5, beta_prime=0.3)
    weight = np.asarray(dr_dpo_loss(**float32(arrays), **options).metrics["pair_weight"])
    assert weight.mean() == pytest.approx(1.0, rel=1e-5) and weight.max() - weight.min() > 0.1
    robust = gradients(functools.partial(dr_dpo_loss, **options), arrays)
    plain = gradients(functools.partial(dpo_loss, beta=0.5), arrays)
    for name in plain:
        np.testing.assert_allclose(robust[name], weight[:, None] * plain[name], rtol=1e-4, atol=1e-6)


def test_dr_dpo_leaves_empty_places_out():
    arrays = pairs(2)
    options: dict[str, Any] = dict(beta=0.5, beta_prime=0.3)
    output = dr_dpo_loss(**float32(with_empty_rows(arrays, [0, 3])), **options)
    expected = np.insert(numpy_dr_dpo(arrays, **options), [0, 3], 0)
    np.testing.assert_allclose(output.loss, expected, rtol=2e-5)
    np.testing.assert_array_equal(output.metrics["pair_weight"] == 0, expected == 0)
    nobody = {name: np.zeros_like(value) for name, value in arrays.items()}
    np.testing.assert_array_equal(dr_dpo_loss(**float32(nobody), beta_prime=5.0).loss, 0.0)
    jax.tree.map(
        lambda g: np.testing.assert_array_equal(g, 0.0),
        gradients(functools.partial(dr_dpo_loss, beta_prime=5.0), nobody),
    )


@pytest.mark.parametrize(
    ("loss", "arrays", "name", "value"),
    [
        (dpop_loss, pairs(), "penalty_coef", -1.0),
        (dpop_loss, pairs(), "beta", 0.0),
        (cal_dpo_loss, pairs(), "calibration_coef", INFINITY),
        (odpo_loss, scored(), "alpha", -0.5),
        (odpo_identity_loss, scored(), "alpha", float("nan")),
        (chi_po_loss, pairs(), "reward_bound", 0.0),
        (chi_po_loss, pairs(), "reward_bound", float("nan")),
        (slic_loss, free(), "delta", -1.0),
        (slic_loss, free(), "nll_coef", -1.0),
        (rrhf_pair_loss, free(), "nll_coef", float("nan")),
        (npo_loss, rejected_side(), "beta", 0.0),
        (dr_dpo_loss, pairs(), "beta_prime", 0.0),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_options_out_of_range_are_refused(loss, arrays, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(arrays), **{name: value})


# Taxonomy


def test_taxonomy_has_four_categories_of_well_formed_ids():
    assert list(TAXONOMY) == ["data strategy", "learning framework", "constraint mechanism", "model property"]
    for groups in TAXONOMY.values():
        for group, papers in groups.items():
            assert papers and len(set(papers)) == len(papers), group
            assert all(re.fullmatch(r"2[3-5]\d\d\.\d{5}", paper) for paper in papers), group


def test_every_listed_paper_is_found_in_each_of_its_groups():
    for category, groups in TAXONOMY.items():
        for group, papers in groups.items():
            assert all(f"{category}/{group}" in groups_of(paper) for paper in papers)
    assert groups_of("2412.14516") == ("data strategy/point-wise feedback", "model property/likelihood collapse")
    assert groups_of("2305.18290") == ("data strategy/pair-wise feedback", "learning framework/offline")


def test_taxonomy_cannot_be_changed_and_names_what_it_lacks():
    with pytest.raises(TypeError):
        TAXONOMY["data strategy"]["noise"] = ()  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ValueError, match=r"no paper '1706\.03762'"):
        groups_of("1706.03762")
