"""CPO and ARPO against float64 NumPy written from the formulas, their shared likelihood term and the relaxation."""

import functools

import jax
import numpy as np
import pytest
from numeric import (
    assert_formula,
    central_differences,
    completions,
    float32,
    gradients,
    mean,
    one_token,
    softplus,
    total,
)

from dpo_jax.language.methods.cpo import arpo_loss, cpo_hinge_loss, cpo_ipo_loss, cpo_loss
from dpo_jax.language.methods.dpo import cdpo_loss, reference_free_loss
from dpo_jax.language.methods.simpo import simpo_loss

SIDES = ("chosen", "rejected")


def pairs(seed=0):
    return completions(SIDES, reference=False, seed=seed)


def numpy_nll(a):
    """Per row, so that the mean over the rows is the cross-entropy per chosen token of the batch."""
    return -total(a, "chosen") * len(a["chosen_mask"]) / a["chosen_mask"].sum()


def gap(a):
    return total(a, "chosen") - total(a, "rejected")


def numpy_cpo(a, beta=0.1, nll_coef=1.0, label_smoothing=0.0):
    x = beta * gap(a)
    preference = (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)
    return preference + nll_coef * numpy_nll(a)


def numpy_hinge(a, beta=0.1, nll_coef=1.0):
    return np.maximum(0, 1 - beta * gap(a)) + nll_coef * numpy_nll(a)


def numpy_ipo(a, beta=0.1, nll_coef=1.0):
    return (mean(a, "chosen") - mean(a, "rejected") - 1 / (2 * beta)) ** 2 + nll_coef * numpy_nll(a)


def numpy_rejection(a, relax_scale, relax_rate):
    distance = np.abs(mean(a, "chosen") - mean(a, "rejected"))
    return np.minimum(relax_scale * np.exp(relax_rate * distance) - 1, 1.0)


def numpy_arpo(a, beta=0.1, nll_coef=1.0, relax_scale=0.9, relax_rate=0.4):
    k = numpy_rejection(a, relax_scale, relax_rate)
    return softplus(-beta * (total(a, "chosen") - k * total(a, "rejected"))) + nll_coef * numpy_nll(a)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "formula", "options"),
    [
        (cpo_loss, numpy_cpo, dict()),
        (cpo_loss, numpy_cpo, dict(beta=0.6, nll_coef=0.3, label_smoothing=0.2)),
        (cpo_hinge_loss, numpy_hinge, dict()),
        (cpo_hinge_loss, numpy_hinge, dict(beta=0.5, nll_coef=0.2)),
        (cpo_ipo_loss, numpy_ipo, dict()),
        (cpo_ipo_loss, numpy_ipo, dict(beta=0.5, nll_coef=0.2)),
        (arpo_loss, numpy_arpo, dict()),
        (arpo_loss, numpy_arpo, dict(beta=0.3, nll_coef=0.4, relax_scale=1.3, relax_rate=1.1)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_value_and_gradient(loss, formula, options, seed):
    assert_formula(functools.partial(loss, **options), functools.partial(formula, **options), pairs(seed))


def test_without_the_likelihood_cpo_is_reference_free_dpo():
    arrays = float32(pairs())
    np.testing.assert_allclose(cpo_loss(**arrays, nll_coef=0.0).loss, reference_free_loss(**arrays).loss, rtol=1e-6)
    zeros = {f"reference_{side}_logps": 0 * arrays[f"policy_{side}_logps"] for side in SIDES}
    smoothed = cpo_loss(**arrays, nll_coef=0.0, label_smoothing=0.3).loss
    np.testing.assert_allclose(smoothed, cdpo_loss(**arrays, **zeros, label_smoothing=0.3).loss, rtol=1e-6)


def test_equal_sums_cost_log_two():
    inputs = one_token([-1.0, -7.0], [-1.0, -7.0])
    np.testing.assert_allclose(cpo_loss(**inputs, nll_coef=0.0, beta=3.0).loss, np.log(2), rtol=1e-6)


def test_simpo_on_answers_of_one_token_is_cpo():
    inputs = one_token([-1.0, -7.0, -0.2], [-2.0, -3.0, -5.0])
    simpo = simpo_loss(**inputs, beta=0.7, gamma=0.0).loss
    np.testing.assert_allclose(cpo_loss(**inputs, nll_coef=0.0, beta=0.7).loss, simpo, rtol=1e-6)


@pytest.mark.parametrize("loss", [cpo_loss, cpo_hinge_loss])
def test_a_constant_of_both_sums_moves_the_likelihood_only(loss):
    arrays = pairs()
    moved = {name: value.copy() for name, value in arrays.items()}
    for side in SIDES:
        moved[f"policy_{side}_logps"][:, 0] -= 2.0  # the first token is never masked
    there, here = loss(**float32(moved)), loss(**float32(arrays))
    np.testing.assert_allclose(there.loss - there.metrics["nll"], here.loss - here.metrics["nll"], rtol=1e-4, atol=1e-6)
    assert np.mean(there.metrics["nll"] - here.metrics["nll"]) == pytest.approx(
        2.0 * 5 / arrays["chosen_mask"].sum(), rel=1e-4
    )


def test_the_likelihood_is_the_batchs_token_mean():
    """The gradient of the mean loss is that of the mean over all chosen tokens, whichever rows they stand in."""
    arrays = pairs()
    slopes = [gradients(functools.partial(cpo_loss, nll_coef=c), arrays)["policy_chosen_logps"] / 5 for c in (0.0, 1.0)]

    def token_mean(a):
        return -(a["policy_chosen_logps"] * a["chosen_mask"]).sum(keepdims=True) / a["chosen_mask"].sum()

    expected = central_differences(token_mean, arrays, "policy_chosen_logps")
    np.testing.assert_allclose(slopes[1] - slopes[0], expected, rtol=1e-4, atol=1e-6)
    assert len(np.unique(expected.round(8))) == 2  # every token of the batch weighs alike


def test_cpo_ipo_rests_at_its_target_per_token():
    beta, m = 0.25, -1.0
    inputs = one_token([m] * 3, m - np.array([1.9, 2.0, 2.1]))
    slope = jax.grad(
        lambda p: cpo_ipo_loss(**{**inputs, "policy_chosen_logps": p}, beta=beta, nll_coef=0.0).loss.sum()
    )(inputs["policy_chosen_logps"])[:, 0]
    assert slope[0] < 0 and slope[1] == 0 and slope[2] > 0


# ARPO


def test_arpo_with_the_cap_reached_is_cpo():
    inputs = one_token([-1.0, -30.0], [-20.0, -1.0])  # a gap of 19 and more: 0.9 exp(7.6) - 1 > 1
    there = arpo_loss(**inputs)
    np.testing.assert_array_equal(there.metrics["rejection"], 1.0)
    np.testing.assert_allclose(there.loss, cpo_loss(**inputs).loss, rtol=1e-6)
    edge = np.log(2 / 0.9) / 0.4
    rejection = arpo_loss(**one_token([-1.0, -1.0], [-1.0 - edge - 1e-3, -1.0 - edge + 1e-3])).metrics["rejection"]
    assert rejection[0] == 1 and 0.99 < rejection[1] < 1


def arpo_slope(inputs, side, **options):
    """d loss / d log-probability of one side's token without the likelihood term; not compiled, so that k is exact."""
    name = f"policy_{side}_logps"
    slope = jax.grad(lambda p: arpo_loss(**{**inputs, name: p}, nll_coef=0.0, **options).loss.sum())(inputs[name])
    return np.asarray(slope)[:, 0]


@pytest.mark.parametrize(("scale", "rejection"), [(1.0, 0.0), (0.9, -0.1)])
def test_arpo_at_equal_means(scale, rejection):
    """From c1 = 1 on the rejected answer is not pushed; at the default 0.9 it is drawn up a little."""
    inputs = one_token([-1.0, -7.0], [-1.0, -7.0])
    metrics = arpo_loss(**inputs, relax_scale=scale).metrics
    np.testing.assert_allclose(metrics["rejection"], rejection, atol=1e-6)
    pushed = arpo_slope(inputs, "rejected", relax_scale=scale)
    assert np.all(pushed == 0) if scale == 1 else np.all(pushed < 0)
    assert np.all(arpo_slope(inputs, "chosen", relax_scale=scale) < 0)


def test_the_gradient_through_k_widens_the_gap():
    """Just off equal means it outweighs the negative k: the less likely of the two is pushed down."""
    m_w, m_l = np.array([-1.0, -1.0]), np.array([-1.001, -0.999])
    slope = arpo_slope(one_token(m_w, m_l), "rejected")
    assert slope[0] > 0 > slope[1]


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_rejection_is_not_negative_from_scale_one_on(scale):
    metrics = arpo_loss(**float32(pairs()), relax_scale=scale, relax_rate=0.3).metrics
    expected = numpy_rejection(pairs(), scale, 0.3)
    np.testing.assert_allclose(metrics["rejection"], expected, rtol=1e-4, atol=1e-6)
    assert np.all(metrics["rejection"] >= 0)


def test_arpo_far_apart_has_a_finite_gradient():
    inputs = one_token([-1e-3, -1e4], [-1e4, -1e-3])
    for side in SIDES:
        name = f"policy_{side}_logps"
        slope = jax.grad(lambda p, name=name: arpo_loss(**{**inputs, name: p}).loss.sum())(inputs[name])
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (cpo_loss, "beta", 0.0),
        (cpo_loss, "label_smoothing", 0.6),
        (cpo_hinge_loss, "nll_coef", -1.0),
        (cpo_ipo_loss, "nll_coef", float("nan")),
        (arpo_loss, "relax_scale", 0.0),
        (arpo_loss, "relax_rate", -0.1),
    ],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(pairs()), **{name: value})
