"""MaPO against float64 NumPy written from the formula, its score, and its bounds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import errors
from numeric import assert_formula, float32, gradients, softplus

from dpo_jax.diffusion.methods.diffusion_baselines import diffusion_sft_chosen_loss
from dpo_jax.diffusion.methods.mapo import likelihood_score, mapo_loss
from dpo_jax.signatures import read_needs


def policy_errors(seed=0, scale=1.0):
    return {n: scale * v for n, v in errors(seed, spread=0.05).items() if n.startswith("policy")}


def numpy_mapo(a, beta, snr, margin_scale):
    chosen, rejected = (snr * a[f"policy_{side}_error"] for side in ("chosen", "rejected"))
    margin = margin_scale * (chosen / np.expm1(chosen) - rejected / np.expm1(rejected))
    return a["policy_chosen_error"] + beta * softplus(-margin)


@pytest.mark.parametrize("options", [dict(beta=0.1, snr=0.5), dict(beta=2.0, snr=1.5)])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_value_and_gradient(options, scale):
    options = {**options, "margin_scale": 12.0}
    assert_formula(mapo_loss, lambda a: numpy_mapo(a, **options), policy_errors(scale=scale), **options)


@pytest.mark.parametrize("x", [0.0, 1e-8, 1e-3, 0.2, 0.49999, 0.5, 0.50001, 3.0, 400.0])
def test_score_and_its_slope(x):
    value, slope = jax.value_and_grad(likelihood_score)(jnp.float32(x))
    x = float(np.float32(x))
    wide = np.longdouble(x)
    expected = float(wide / np.expm1(wide)) if x else 1.0
    # x/(e^x - 1) has the slope (e^x (1 - x) - 1) / (e^x - 1)^2 = -1/2 + x/6 - x^3/180 near 0
    far = float((np.exp(-wide) * (1 - wide) - np.exp(-2 * wide)) / np.expm1(-wide) ** 2) if x else -0.5
    near = -0.5 + x / 6 - x**3 / 180 + x**5 / 5040
    assert value == pytest.approx(expected, rel=1e-6)
    assert slope == pytest.approx(near if x < 0.1 else far, rel=2e-6, abs=1e-30)


def test_score_falls_from_one_towards_zero():
    x = np.concatenate([[0.0], np.geomspace(1e-3, 80.0, 200)]).astype(np.float32)
    score = np.asarray(likelihood_score(jnp.asarray(x)))
    assert score[0] == 1 and np.all(np.diff(score) < 0) and np.all(score > 0)


def test_without_the_preference_it_is_fine_tuning():
    arrays = policy_errors()
    np.testing.assert_allclose(
        mapo_loss(**float32(arrays), beta=0.0).loss,
        diffusion_sft_chosen_loss(policy_chosen_error=jnp.asarray(arrays["policy_chosen_error"])).loss,
    )
    slopes = gradients(mapo_loss, arrays, beta=0.0)
    np.testing.assert_array_equal(slopes["policy_rejected_error"], 0.0)
    np.testing.assert_array_equal(slopes["policy_chosen_error"], 1.0)


@pytest.mark.parametrize("error", [0.0, 1e-8, 0.3, 800.0])
def test_identical_images_give_log_two(error):
    arrays: dict[str, Any] = dict(policy_chosen_error=jnp.array([error]), policy_rejected_error=jnp.array([error]))
    np.testing.assert_allclose(mapo_loss(**arrays, beta=0.7).loss, error + 0.7 * np.log(2), rtol=1e-6)


def test_small_errors_make_the_margin_of_diffusion_dpo_with_beta_500_and_no_reference():
    chosen, rejected = jnp.array([0.001, 0.004]), jnp.array([0.003, 0.002])
    margin = mapo_loss(policy_chosen_error=chosen, policy_rejected_error=rejected).metrics["margin"]
    np.testing.assert_allclose(margin, 500 / 2 * (rejected - chosen), rtol=5e-3)


def test_push_on_the_rejected_image_is_bounded():
    rng = np.random.default_rng(0)
    arrays = {f"policy_{side}_error": rng.gamma(0.5, 1.0, 300) for side in ("chosen", "rejected")}
    slopes = gradients(mapo_loss, arrays)["policy_rejected_error"]
    bound = 0.1 * 1000 * 0.5 / 2
    assert np.all(slopes <= 0) and np.all(slopes >= -bound * (1 + 1e-5)) and slopes.min() < -0.9 * bound


def test_it_never_asks_for_a_reference():
    assert read_needs(mapo_loss).arrays == ("policy_chosen_error", "policy_rejected_error")


@pytest.mark.parametrize("name", ["snr", "margin_scale"])
def test_scales_out_of_range_are_refused(name):
    options: dict[str, Any] = {name: 0.0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        mapo_loss(**float32(policy_errors()), **options)
