"""LD-DPO against float64 NumPy written from the formula, its token weights, and what it does to the wish to go on."""

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import float32, value_and_gradients

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.ld_dpo import ld_dpo_loss, ld_weights

B, T = 6, 7
SIDES = ("chosen", "rejected")


def pairs(seed=0, holes=True):
    """Float64 pairs with ragged masks; holes in the first row's masks."""
    arrays = numeric.pairs(seed, rows=B, tokens=T)
    if holes:
        arrays["chosen_mask"][0] = [0, 1, 0, 1, 1, 0, 1]
        arrays["rejected_mask"][0] = [1, 0, 0, 1, 0, 0, 0]
    return arrays


def loop_weights(mask, other, alpha, last):
    """Token by token: one while no more tokens were seen than the shorter answer has."""
    weights = np.zeros_like(mask)
    for row in range(len(mask)):
        shared, length, seen = min(mask[row].sum(), other[row].sum()), mask[row].sum(), 0
        for t in range(mask.shape[1]):
            if mask[row, t]:
                seen += 1
                weights[row, t] = 1.0 if seen <= shared or (last and seen == length) else alpha
    return weights


def numpy_loss(a, beta, alpha, last=False):
    masks = [a[f"{side}_mask"] for side in SIDES]
    weights = loop_weights(*masks, alpha, last), loop_weights(*masks[::-1], alpha, last)
    u, v = (
        (w * (a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"])).sum(-1) for s, w in zip(SIDES, weights, strict=True)
    )
    return np.logaddexp(0, -beta * (u - v)), u, v, weights


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_weights_token_by_token(alpha, last):
    masks = {name: value for name, value in pairs(1).items() if name.endswith("mask")}
    masks["rejected_mask"] = masks["rejected_mask"][:, :5]  # the sides may be padded to different lengths
    masks["chosen_mask"][2] = 0
    for dtype in (bool, np.int32, np.float32):
        inputs = {name: jnp.asarray(mask, dtype) for name, mask in masks.items()}
        actual = ld_weights(**inputs, alpha=alpha, last_token_full_weight=last)
        for side, other in (SIDES, SIDES[::-1]):
            expected = loop_weights(masks[f"{side}_mask"], masks[f"{other}_mask"], alpha, last)
            np.testing.assert_allclose(getattr(actual, side), expected, rtol=1e-6)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (1.3, 0.3)])
def test_value_and_gradient_against_the_formula(beta, alpha, last):
    arrays = pairs(2)
    expected, u, v, weights = numpy_loss(arrays, beta, alpha, last)
    options = dict(beta=beta, alpha=alpha, last_token_full_weight=last)
    output, gradient = value_and_gradients(ld_dpo_loss, arrays, **options)
    np.testing.assert_allclose(output.loss, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(output.metrics["margin"], beta * (u - v), rtol=1e-4, atol=1e-5)
    shared = np.minimum(arrays["chosen_mask"].sum(-1), arrays["rejected_mask"].sum(-1))
    np.testing.assert_array_equal(output.metrics["shared_length"], shared)
    slope = -beta / (1 + np.exp(beta * (u - v)))
    for side, sign, weight in zip(SIDES, (1, -1), weights):
        np.testing.assert_allclose(
            gradient[f"policy_{side}_logps"], sign * slope[:, None] * weight, rtol=1e-4, atol=1e-6
        )


def test_full_weight_and_equal_lengths_are_dpo():
    arrays = pairs(3)
    np.testing.assert_allclose(
        ld_dpo_loss(**float32(arrays), alpha=1.0).loss, dpo_loss(**float32(arrays)).loss, rtol=1e-6
    )
    level = float32({**arrays, "rejected_mask": arrays["chosen_mask"]})
    for alpha in (0.0, 0.5):
        np.testing.assert_allclose(ld_dpo_loss(**level, alpha=alpha).loss, dpo_loss(**level).loss, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_no_weight_is_dpo_of_answers_cut_to_the_shared_length(seed):
    arrays = pairs(seed, holes=False)
    shared = arrays["chosen_mask"] * arrays["rejected_mask"]
    cut = float32({**arrays, "chosen_mask": shared, "rejected_mask": shared})
    np.testing.assert_allclose(ld_dpo_loss(**float32(arrays), alpha=0.0).loss, dpo_loss(**cut).loss, rtol=1e-6)


def test_margin_is_linear_in_alpha():
    arrays = float32(pairs(4))
    low, half, high = (ld_dpo_loss(**arrays, alpha=a).metrics["margin"] for a in (0.0, 0.5, 1.0))
    assert np.any(np.abs(high - low) > 0.01)
    np.testing.assert_allclose(half, (low + high) / 2, rtol=1e-5, atol=1e-6)


def test_tail_learns_alpha_times_as_much_and_the_shorter_answer_as_ever():
    arrays = pairs(5)
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in SIDES}}
    _, full = value_and_gradients(ld_dpo_loss, same, beta=0.8, alpha=1.0)
    for alpha in (0.0, 0.3):
        _, actual = value_and_gradients(ld_dpo_loss, same, beta=0.8, alpha=alpha)
        for side, other in (SIDES, SIDES[::-1]):
            weights = loop_weights(arrays[f"{side}_mask"], arrays[f"{other}_mask"], alpha, False)
            name = f"policy_{side}_logps"
            np.testing.assert_allclose(actual[name], weights * np.asarray(full[name]), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_loss_is_log_two_when_policy_is_reference(alpha):
    arrays = pairs()
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in SIDES}}
    np.testing.assert_allclose(ld_dpo_loss(**float32(same), alpha=alpha).loss, np.log(2), rtol=1e-6)


def test_where_the_tokens_stand_in_the_row_does_not_matter():
    arrays = pairs(6)
    before = ld_dpo_loss(**float32(arrays)).loss
    moved = {
        name: np.pad(value, [(0, 0), (4, 1)] if "chosen" in name else [(0, 0), (0, 5)])
        for name, value in arrays.items()
    }
    np.testing.assert_allclose(ld_dpo_loss(**float32(moved)).loss, before, rtol=1e-6)


@pytest.mark.parametrize(("n", "k", "alpha"), [(6, 2, 0.5), (5, 4, 0.0), (7, 1, 0.25)])
def test_push_on_going_on_in_a_model_of_constant_hazard(n, k, alpha):
    # Every token is "go on" with probability c but for the last, a stop. A chosen answer of n tokens against one of k
    # moves the logit of c by (n-k)(1-c) in DPO. The published weights discount the stop of the longer answer only.
    c = 0.8
    masks = [(jnp.arange(n) < length).astype(jnp.float32)[None] for length in (n, k)]
    stops = [jnp.arange(n) == length - 1 for length in (n, k)]
    logit = jnp.log(c / (1 - c))

    def push(last):
        @jax.jit
        @jax.grad
        def loss(z):
            chosen, rejected = (jnp.where(stop, jax.nn.log_sigmoid(-z), jax.nn.log_sigmoid(z))[None] for stop in stops)
            fixed = [jax.lax.stop_gradient(x) for x in (chosen, rejected)]
            return ld_dpo_loss(
                policy_chosen_logps=chosen,
                policy_rejected_logps=rejected,
                reference_chosen_logps=fixed[0],
                reference_rejected_logps=fixed[1],
                chosen_mask=masks[0],
                rejected_mask=masks[1],
                beta=2.0,
                alpha=alpha,
                last_token_full_weight=last,
            ).loss[0]

        return -float(loss(logit))  # beta sigma(0) = 1

    assert push(False) == pytest.approx((1 - alpha) + alpha * (n - k) * (1 - c), rel=1e-5)
    assert push(True) == pytest.approx((1 - c) * (1 + alpha * (n - k - 1)), rel=1e-5)


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(alpha=-0.1), dict(alpha=1.1), dict(alpha=float("nan"))])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ld_dpo_loss(**float32(pairs()), **options)
