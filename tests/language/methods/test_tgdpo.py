"""TGDPO against float64 NumPy, its reductions to DPO and what the guidance does to each token's gradient."""

import functools

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import central_differences, float32, gradients, without

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.tgdpo import tgdpo_loss, tgdpo_weights, token_guidance

B, T = 5, 6
SIDES = ("chosen", "rejected")


def pairs(seed=0, spread=0.5):
    arrays, rng = numeric.pairs(seed, spread), np.random.default_rng([seed, 1])
    for side in SIDES:
        arrays[f"guidance_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(0, 2.0, (B, T))
    return arrays


def without_guidance(arrays):
    return without(arrays, "guidance")


def numpy_weights(a, scale, alpha, floor=-np.inf):
    out = []
    for side, sign in (("chosen", 1), ("rejected", -1)):
        r = scale * (a[f"guidance_{side}_logps"] - a[f"reference_{side}_logps"])
        out.append(np.maximum(1 + sign * alpha * r, floor))
    return out


def numpy_margin(a, beta, alpha, guidance_beta=None, weight_floor=None):
    floor = -np.inf if weight_floor is None else weight_floor
    total = 0.0
    for side, weight in zip(SIDES, numpy_weights(a, guidance_beta or beta, alpha, floor), strict=True):
        ratio = a[f"policy_{side}_logps"] - a[f"reference_{side}_logps"]
        total = total + beta * (weight * ratio * a[f"{side}_mask"]).sum(-1) * (1 if side == "chosen" else -1)
    return total


def numpy_tgdpo(a, **options):
    return np.logaddexp(0.0, -numpy_margin(a, **options))


@pytest.mark.parametrize(
    "options",
    [
        dict(beta=0.1, alpha=0.5),
        dict(beta=0.8, alpha=2.0),
        dict(beta=0.3, alpha=1.0, guidance_beta=1.5),
        dict(beta=0.8, alpha=2.0, weight_floor=0.1),
    ],
    ids=str,
)
def test_value_and_gradient_against_the_formula(options):
    arrays = pairs()
    function, loss = functools.partial(numpy_tgdpo, **options), functools.partial(tgdpo_loss, **options)
    output = loss(**float32(arrays))
    np.testing.assert_allclose(output.loss, function(arrays), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(output.metrics["weighted_margin"], numpy_margin(arrays, **options), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, central_differences(function, arrays, name), rtol=1e-4, atol=1e-6)


def test_defaults_are_the_papers():
    arrays = pairs(1)
    np.testing.assert_allclose(tgdpo_loss(**float32(arrays)).loss, numpy_tgdpo(arrays, beta=0.1, alpha=0.5), rtol=2e-5)


@pytest.mark.parametrize("reason", ["alpha is 0", "the guide is the reference"])
def test_reduces_to_dpo(reason):
    arrays = pairs(2)
    if reason == "the guide is the reference":
        arrays |= {f"guidance_{side}_logps": arrays[f"reference_{side}_logps"] for side in SIDES}
    loss = functools.partial(tgdpo_loss, beta=0.4, alpha=0.0 if reason == "alpha is 0" else 2.0)
    dpo = functools.partial(dpo_loss, beta=0.4)
    np.testing.assert_allclose(
        loss(**float32(arrays)).loss, dpo(**float32(without_guidance(arrays))).loss, rtol=1e-6, atol=1e-7
    )
    expected = gradients(dpo, without_guidance(arrays))
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_start_is_log_two_with_the_weights_in_the_gradient():
    arrays, beta, alpha = pairs(3, spread=0.0), 0.6, 1.0
    output = tgdpo_loss(**float32(arrays), beta=beta, alpha=alpha)
    np.testing.assert_allclose(output.loss, np.log(2.0), rtol=1e-6)
    gradient = gradients(functools.partial(tgdpo_loss, beta=beta, alpha=alpha), arrays)
    f_w, f_l = numpy_weights(arrays, beta, alpha)
    np.testing.assert_allclose(
        gradient["policy_chosen_logps"], -beta / 2 * f_w * arrays["chosen_mask"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        gradient["policy_rejected_logps"], beta / 2 * f_l * arrays["rejected_mask"], rtol=1e-5, atol=1e-6
    )


def test_gradient_by_hand_away_from_the_start():
    arrays, beta, alpha = pairs(4), 0.6, 1.0
    slope = -beta / (1 + np.exp(numpy_margin(arrays, beta, alpha)))
    gradient = gradients(functools.partial(tgdpo_loss, beta=beta, alpha=alpha), arrays)
    f_w, _ = numpy_weights(arrays, beta, alpha)
    np.testing.assert_allclose(
        gradient["policy_chosen_logps"], slope[:, None] * f_w * arrays["chosen_mask"], rtol=1e-4, atol=1e-6
    )


def test_weights_are_affine_and_exchange_with_the_sides():
    rng = np.random.default_rng(5)
    a, b = (jnp.asarray(rng.normal(0, 1, (B, T)), jnp.float32) for _ in range(2))
    here = tgdpo_weights(chosen_guidance=a, rejected_guidance=b, alpha=0.7)
    np.testing.assert_allclose(here.chosen, 1 + 0.7 * a, rtol=1e-6)
    np.testing.assert_allclose(here.rejected, 1 - 0.7 * b, rtol=1e-6, atol=1e-7)
    mirrored = tgdpo_weights(chosen_guidance=-b, rejected_guidance=-a, alpha=0.7)
    np.testing.assert_allclose(mirrored.chosen, here.rejected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mirrored.rejected, here.chosen, rtol=1e-6, atol=1e-7)
    floored = tgdpo_weights(chosen_guidance=10 * a, rejected_guidance=b, alpha=0.7, weight_floor=0.25)
    assert float(floored.chosen.min()) == 0.25 and float(floored.chosen.max()) > 2


def test_a_guide_frozen_at_the_policy_rewards_any_movement_of_the_chosen_answer():
    arrays, beta, alpha = pairs(6), 0.5, 1.0
    arrays |= {f"guidance_{side}_logps": arrays[f"policy_{side}_logps"] for side in SIDES}
    metrics = tgdpo_loss(**float32(arrays), beta=beta, alpha=alpha).metrics
    ratio = {s: (arrays[f"policy_{s}_logps"] - arrays[f"reference_{s}_logps"]) * arrays[f"{s}_mask"] for s in SIDES}
    squares = {s: alpha * beta * (r**2).sum(-1) for s, r in ratio.items()}
    expected = beta * (ratio["chosen"].sum(-1) + squares["chosen"] - ratio["rejected"].sum(-1) + squares["rejected"])
    np.testing.assert_allclose(metrics["weighted_margin"], expected, rtol=1e-4, atol=1e-5)
    assert np.all(metrics["weighted_margin"] >= metrics["margin"])


def test_weight_metrics_count_negative_weights_of_tokens_that_are_there():
    ones = jnp.ones((2, 3))
    # alpha beta_g = 1: chosen weights are 1 + guidance - reference = (3, -1, garbage) and an empty row
    arrays = dict(
        policy_chosen_logps=-ones,
        policy_rejected_logps=-ones,
        reference_chosen_logps=-ones,
        reference_rejected_logps=-ones,
        guidance_chosen_logps=jnp.array([[1.0, -3.0, jnp.nan]] * 2),
        guidance_rejected_logps=-ones,
        chosen_mask=jnp.array([[1, 1, 0], [0, 0, 0]]),
        rejected_mask=ones,
    )
    metrics = tgdpo_loss(**arrays, beta=0.5, alpha=1.0, guidance_beta=1.0).metrics
    np.testing.assert_allclose(metrics["chosen_weight"], [1.0, 0.0])
    np.testing.assert_allclose(metrics["chosen_weight_min"], [-1.0, 0.0])
    np.testing.assert_allclose(metrics["chosen_weight_negative"], [0.5, 0.0])
    np.testing.assert_allclose(metrics["rejected_weight"], 1.0)
    floored = tgdpo_loss(**arrays, beta=0.5, alpha=1.0, guidance_beta=1.0, weight_floor=0.0).metrics
    np.testing.assert_allclose(floored["chosen_weight_negative"], 0.0)


def test_guidance_is_zero_behind_the_mask_and_a_constant():
    logps = jnp.array([[-1.0, jnp.nan]])
    mask = jnp.array([[1, 0]])
    r = token_guidance(guidance_logps=logps, reference_logps=2 * logps, mask=mask, guidance_beta=0.5)
    np.testing.assert_allclose(r, [[0.5, 0.0]])
    gradient = jax.grad(
        lambda g: token_guidance(guidance_logps=g, reference_logps=logps, mask=mask, guidance_beta=0.5).sum()
    )(logps)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", 0.0), ("alpha", -0.5), ("guidance_beta", 0.0), ("weight_floor", float("nan"))],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        tgdpo_loss(**float32(pairs()), **{name: value})
