"""DMPO against float64 NumPy written from the formula, and the shape of its loss."""

from typing import Any

import numpy as np
import pytest
from error_arrays import at_margin, errors, margin
from numeric import assert_formula, float32, gradients, sigmoid, softplus

from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.dmpo import dmpo_loss


def numpy_dmpo(a, beta, alpha):
    u, q = beta / 2 * margin(a), np.clip(1 - alpha, 1e-6, 1 - 1e-6)
    p = sigmoid(u)
    return p * (-softplus(-u) - np.log(q)) + (1 - p) * (-softplus(u) - np.log(1 - q))


def at_u(u, **options: Any):
    """Loss and its slope in u."""
    arrays = at_margin(u)
    loss = dmpo_loss(**float32(arrays), beta=2.0, **options).loss
    return np.asarray(loss), -gradients(dmpo_loss, arrays, beta=2.0, **options)["policy_chosen_error"]


@pytest.mark.parametrize("alpha", [0.01, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient(alpha, seed):
    options = dict(beta=12.0, alpha=alpha)
    assert_formula(dmpo_loss, lambda a: numpy_dmpo(a, **options), errors(seed), **options)


def test_slope_is_the_closed_form():
    u = np.linspace(-8, 8, 17)
    p = sigmoid(u)
    np.testing.assert_allclose(at_u(u)[1], p * (1 - p) * (u - np.log(99)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_minimum_is_zero_at_the_labels_log_odds(alpha):
    best = np.log((1 - alpha) / alpha)
    loss, slope = at_u([best, best - 1, best + 1], alpha=alpha)
    np.testing.assert_allclose([loss[0], slope[0]], 0, atol=1e-6)
    assert slope[1] < -1e-3 and slope[2] > 1e-3


def test_values_at_the_start_and_far_away():
    loss, slope = at_u([0.0, 500.0, -500.0, 4000.0, -4000.0])
    np.testing.assert_allclose(loss, [1.6144, 0.01005, 4.60517, 0.01005, 4.60517], atol=1e-4)
    assert slope[0] == pytest.approx(-np.log(99) / 4, rel=1e-4)  # -1.149 where Diffusion-DPO has -0.5
    np.testing.assert_array_equal(slope[1:], 0.0)
    dpo = gradients(diffusion_dpo_loss, at_margin([0.0, -500.0]), beta=2.0)["policy_chosen_error"]
    np.testing.assert_allclose(dpo, [0.5, 1.0])  # a pair far on the wrong side keeps its whole push there


@pytest.mark.parametrize(("alpha", "place", "steepest"), [(0.01, -0.405, -1.200), (0.05, -0.583, None)])
def test_the_steepest_point_is_close_to_the_start(alpha, place, steepest):
    u = np.arange(-3, 3, 0.005)
    slope = at_u(u, alpha=alpha)[1]
    assert u[np.argmin(slope)] == pytest.approx(place, abs=0.02)
    if steepest:
        assert slope.min() == pytest.approx(steepest, abs=2e-3)


def test_half_is_symmetric_and_swapped_labels_swap_the_pair():
    u = np.array([-3.0, -0.5, 0.4, 2.0])
    np.testing.assert_allclose(at_u(u, alpha=0.5)[0], at_u(-u, alpha=0.5)[0], rtol=1e-5)
    np.testing.assert_allclose(at_u([0.0], alpha=0.5), 0, atol=1e-6)
    np.testing.assert_allclose(at_u(u, alpha=0.2)[0], at_u(-u, alpha=0.8)[0], rtol=1e-5)


def test_forward_divergence_is_smoothed_diffusion_dpo_less_the_labels_entropy():
    alpha, u = 0.2, np.array([-1.0, 0.3, 2.5])
    q, p = 1 - alpha, sigmoid(u)
    forward = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    entropy = -(q * np.log(q) + (1 - q) * np.log(1 - q))
    smoothed = diffusion_dpo_loss(**float32(at_margin(u)), beta=2.0, label_smoothing=alpha).loss
    np.testing.assert_allclose(smoothed - entropy, forward, rtol=1e-5)


def test_certain_labels_are_clamped():
    loss, slope = at_u([0.0, 3.0, -3.0], alpha=0.0)
    np.testing.assert_allclose(loss, numpy_dmpo(at_margin([0.0, 3.0, -3.0]), 2.0, 0.0), rtol=1e-5)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        dmpo_loss(**float32(errors()), alpha=alpha)
