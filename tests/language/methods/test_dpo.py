"""The DPO family against float64 NumPy written from the formulas, and the properties its papers promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import central_differences, float32, gradients, pairs, softplus, sums

from dpo_jax.language.methods import (
    alpha_divergence_loss,
    cdpo_loss,
    dpo_loss,
    forward_kl_loss,
    hinge_loss,
    ipo_loss,
    ipo_sum_loss,
    js_loss,
    rdpo_loss,
    reference_free_loss,
    robust_loss,
    rpo_loss,
    rpo_sum_loss,
    rpo_token_mean_loss,
)
from dpo_jax.tree import interpolate

B, T = 5, 6
LOG2 = np.log(2.0)


# Each formula of the module's card once more, in float64 NumPy: arrays -> [B].


def numpy_dpo(a, beta):
    _, u, _, _, v, _ = sums(a)
    return softplus(-beta * (u - v))


def numpy_cdpo(a, beta, label_smoothing):
    _, u, _, _, v, _ = sums(a)
    x = beta * (u - v)
    return (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


def numpy_robust(a, beta, label_smoothing):
    _, u, _, _, v, _ = sums(a)
    x, e = beta * (u - v), label_smoothing
    return ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e)


def numpy_hinge(a, beta):
    _, u, _, _, v, _ = sums(a)
    return np.maximum(0, 1 - beta * (u - v))


def numpy_ipo(a, beta):
    _, u, chosen_length, _, v, rejected_length = sums(a)
    return (u / chosen_length - v / rejected_length - 1 / (2 * beta)) ** 2


def numpy_ipo_sum(a, beta):
    _, u, _, _, v, _ = sums(a)
    return (u - v - 1 / (2 * beta)) ** 2


def numpy_forward_kl(a, beta):
    _, u, _, _, v, _ = sums(a)
    return softplus(-beta * (np.exp(-v) - np.exp(-u)))


def numpy_js(a, beta):
    _, u, _, _, v, _ = sums(a)
    return softplus(-beta * (softplus(-v) - softplus(-u)))


def numpy_alpha(a, beta, alpha):
    _, u, _, _, v, _ = sums(a)
    return softplus(-beta * (np.exp(-alpha * v) - np.exp(-alpha * u)) / alpha)


def numpy_rdpo(a, beta, alpha):
    _, u, chosen_length, _, v, rejected_length = sums(a)
    return softplus(-(beta * (u - v) + alpha * (chosen_length - rejected_length)))


def numpy_rpo(a, beta, nll_coef):
    s_w, _, length, _, _, _ = sums(a)
    return numpy_dpo(a, beta) - nll_coef * s_w / length


def numpy_rpo_token_mean(a, beta, nll_coef):
    s_w, _, length, _, _, _ = sums(a)
    return numpy_dpo(a, beta) - nll_coef * s_w * B / length.sum()


def numpy_rpo_sum(a, beta, nll_coef):
    return numpy_dpo(a, beta) - nll_coef * sums(a)[0]


MEMBERS = [
    (dpo_loss, numpy_dpo, dict(beta=0.1)),
    (dpo_loss, numpy_dpo, dict(beta=2.0)),
    (cdpo_loss, numpy_cdpo, dict(beta=0.7, label_smoothing=0.2)),
    (robust_loss, numpy_robust, dict(beta=0.7, label_smoothing=0.3)),
    (hinge_loss, numpy_hinge, dict(beta=0.6)),
    (ipo_loss, numpy_ipo, dict(beta=0.3)),
    (ipo_sum_loss, numpy_ipo_sum, dict(beta=0.3)),
    (forward_kl_loss, numpy_forward_kl, dict(beta=0.2)),
    (js_loss, numpy_js, dict(beta=0.9)),
    (alpha_divergence_loss, numpy_alpha, dict(beta=0.4, alpha=0.3)),
    (alpha_divergence_loss, numpy_alpha, dict(beta=0.4, alpha=0.7)),
    (rdpo_loss, numpy_rdpo, dict(beta=0.5, alpha=0.4)),
    (rpo_loss, numpy_rpo, dict(beta=0.5, nll_coef=0.8)),
    (rpo_token_mean_loss, numpy_rpo_token_mean, dict(beta=0.5, nll_coef=0.8)),
    (rpo_sum_loss, numpy_rpo_sum, dict(beta=0.5, nll_coef=0.2)),
]
IDS = [f"{loss.__name__}-{'-'.join(map(str, options.values()))}" for loss, _, options in MEMBERS]


@pytest.mark.parametrize(("loss", "formula", "options"), MEMBERS, ids=IDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(loss, formula, options, seed):
    arrays = pairs(seed)
    function = functools.partial(formula, **options)
    np.testing.assert_allclose(loss(**float32(arrays), **options).loss, function(arrays), rtol=2e-5, atol=1e-6)
    for name, gradient in gradients(functools.partial(loss, **options), arrays).items():
        np.testing.assert_allclose(gradient, central_differences(function, arrays, name), rtol=1e-4, atol=1e-6)


def test_defaults_are_the_papers():
    arrays = pairs()
    for loss, formula, options in [
        (dpo_loss, numpy_dpo, dict(beta=0.1)),
        (robust_loss, numpy_robust, dict(beta=0.1, label_smoothing=0.1)),
        (ipo_loss, numpy_ipo, dict(beta=0.1)),
        (alpha_divergence_loss, numpy_alpha, dict(beta=0.1, alpha=0.5)),
        (rpo_loss, numpy_rpo, dict(beta=0.1, nll_coef=1.0)),
        (rpo_sum_loss, numpy_rpo_sum, dict(beta=0.01, nll_coef=0.005)),
    ]:
        np.testing.assert_allclose(loss(**float32(arrays)).loss, formula(arrays, **options), rtol=2e-5)


def test_gradient_of_dpo_by_hand():
    arrays, beta = pairs(3), 0.7
    _, u, _, _, v, _ = sums(arrays)
    slope = -beta / (1 + np.exp(beta * (u - v)))  # -beta sigma(-x)
    gradient = gradients(functools.partial(dpo_loss, beta=beta), arrays)
    np.testing.assert_allclose(
        gradient["policy_chosen_logps"], slope[:, None] * arrays["chosen_mask"], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        gradient["policy_rejected_logps"], -slope[:, None] * arrays["rejected_mask"], rtol=1e-5, atol=1e-7
    )


def test_metrics_of_dpo():
    arrays, beta = pairs(1), 0.3
    s_w, u, _, s_l, v, _ = sums(arrays)
    metrics = dpo_loss(**float32(arrays), beta=beta).metrics
    expected = dict(
        chosen_reward=beta * u,
        rejected_reward=beta * v,
        margin=beta * (u - v),
        accuracy=(u > v).astype(float),
        chosen_logps=s_w,
        rejected_logps=s_l,
        chosen_log_ratio=u,
        rejected_log_ratio=v,
    )
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


# Properties


def scalar_pair(d, v=0.0, reference=-3.0):
    """One-token pairs whose log ratios are u = v + d and v; d may be an array."""
    d = jnp.atleast_1d(jnp.asarray(d, jnp.float32))[:, None]
    base = jnp.full_like(d, reference)
    return dict(
        policy_chosen_logps=base + v + d,
        policy_rejected_logps=base + v,
        reference_chosen_logps=base,
        reference_rejected_logps=base,
        chosen_mask=jnp.ones_like(d),
        rejected_mask=jnp.ones_like(d),
    )


def slope_in_d(loss, d, **options):
    """d loss / d (u - v) at each d, through the chosen log-probability."""
    inputs = scalar_pair(d)
    return jax.grad(lambda p: loss(**{**inputs, "policy_chosen_logps": p}, **options).loss.sum())(
        inputs["policy_chosen_logps"]
    )[:, 0]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_values_where_policy_is_reference(beta):
    arrays = pairs()
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in ("chosen", "rejected")}}
    same = float32(same)
    for loss in (dpo_loss, cdpo_loss, robust_loss, js_loss, forward_kl_loss, alpha_divergence_loss):
        np.testing.assert_allclose(loss(**same, beta=beta).loss, LOG2, rtol=1e-6, err_msg=loss.__name__)
        assert not np.any(loss(**same, beta=beta).metrics["accuracy"])
    for loss in (ipo_loss, ipo_sum_loss):
        np.testing.assert_allclose(loss(**same, beta=beta).loss, 1 / (4 * beta**2), rtol=1e-6)
    np.testing.assert_array_equal(hinge_loss(**same, beta=beta).loss, 1.0)


@pytest.mark.parametrize("loss", [cdpo_loss, robust_loss])
def test_no_label_noise_is_dpo(loss):
    arrays = float32(pairs())
    np.testing.assert_allclose(loss(**arrays, label_smoothing=0.0).loss, dpo_loss(**arrays).loss, rtol=1e-6)


def test_cdpo_is_symmetric_at_one_half_and_stops_at_the_log_odds():
    d = np.array([-4.0, -0.5, 0.5, 4.0])
    values = cdpo_loss(**scalar_pair(d), beta=0.5, label_smoothing=0.5).loss
    np.testing.assert_allclose(values, values[::-1], rtol=1e-6)
    assert slope_in_d(cdpo_loss, 0.0, beta=0.5, label_smoothing=0.5)[0] == pytest.approx(0.0, abs=1e-7)
    stop = np.log(0.8 / 0.2) / 0.5
    before, at, after = slope_in_d(cdpo_loss, [stop - 0.1, stop, stop + 0.1], beta=0.5, label_smoothing=0.2)
    assert before < 0 < after and abs(at) < 1e-6


def test_robust_is_unbiased_under_flips_and_unbounded_below():
    e, d = 0.3, np.array([-6.0, -1.0, 0.3, 5.0])
    right = robust_loss(**scalar_pair(d), beta=0.5, label_smoothing=e).loss
    flipped = robust_loss(**scalar_pair(-d), beta=0.5, label_smoothing=e).loss
    np.testing.assert_allclose((1 - e) * right + e * flipped, softplus(-0.5 * d), rtol=1e-5, atol=1e-6)
    far = robust_loss(**scalar_pair(1e4), beta=0.5, label_smoothing=e).loss[0]
    assert far == pytest.approx(-e * 5000 / (1 - 2 * e), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_rdpo_is_dpo_at_alpha_zero_and_at_equal_lengths(alpha):
    arrays = pairs()
    dpo = dpo_loss(**float32(arrays)).loss
    np.testing.assert_array_equal(rdpo_loss(**float32(arrays), alpha=0.0).loss, dpo)
    assert np.any(np.abs(rdpo_loss(**float32(arrays), alpha=alpha).loss - dpo) > 1e-3)
    level = float32({**arrays, "rejected_mask": arrays["chosen_mask"]})
    np.testing.assert_allclose(rdpo_loss(**level, alpha=alpha).loss, dpo_loss(**level).loss, rtol=1e-6)


def test_rdpo_asks_less_of_a_longer_chosen_answer():
    arrays = pairs()
    arrays["chosen_mask"][:], arrays["rejected_mask"][:] = 1.0, np.arange(T) < 2
    arrays = float32(arrays)
    assert np.all(rdpo_loss(**arrays, alpha=0.2).loss < dpo_loss(**arrays).loss)


def test_alpha_divergence_reaches_dpo_and_the_forward_kl():
    arrays = float32(pairs())
    for limit, alpha in ((dpo_loss, 1e-6), (forward_kl_loss, 1 - 1e-6)):
        near = alpha_divergence_loss(**arrays, alpha=alpha)
        np.testing.assert_allclose(near.loss, limit(**arrays).loss, rtol=1e-5)
        np.testing.assert_allclose(near.metrics["margin"], limit(**arrays).metrics["margin"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "loss", [dpo_loss, cdpo_loss, robust_loss, hinge_loss, ipo_sum_loss, rdpo_loss, reference_free_loss]
)
def test_a_constant_of_the_prompt_cancels(loss):
    arrays = pairs()
    if loss is reference_free_loss:
        arrays = {name: value for name, value in arrays.items() if not name.startswith("reference")}
    shifted = {name: value.copy() for name, value in arrays.items()}
    for side in ("chosen", "rejected"):
        shifted[f"policy_{side}_logps"][:, 0] += np.linspace(-3, 3, B)  # the first token is never masked
    np.testing.assert_allclose(loss(**float32(shifted)).loss, loss(**float32(arrays)).loss, rtol=1e-4)


def swapped(arrays):
    exchange = {"chosen": "rejected", "rejected": "chosen"}

    def other(name):
        return "_".join(exchange.get(word, word) for word in name.split("_"))

    return {other(name): value for name, value in arrays.items()}


def test_swapping_the_answers_negates_the_margin():
    arrays, e = float32(pairs()), 0.2
    there, back = dpo_loss(**arrays), dpo_loss(**swapped(arrays))
    np.testing.assert_allclose(back.metrics["margin"], -there.metrics["margin"], rtol=1e-6)
    np.testing.assert_allclose(there.loss - back.loss, -there.metrics["margin"], rtol=1e-4, atol=1e-6)
    mixed = (1 - e) * there.loss + e * back.loss
    np.testing.assert_allclose(cdpo_loss(**arrays, label_smoothing=e).loss, mixed, rtol=1e-6)


@pytest.mark.parametrize("loss", [ipo_loss, ipo_sum_loss])
def test_ipo_rests_exactly_at_its_target(loss):
    below, at, above = slope_in_d(loss, [1.9, 2.0, 2.1], beta=0.25)
    assert below < 0 and at == 0 and above > 0


def test_ipo_divides_by_length_and_the_sum_form_does_not():
    inputs = {name: jnp.tile(value, (1, 4)) for name, value in scalar_pair(0.3).items()}
    assert ipo_loss(**inputs, beta=0.5).loss[0] == pytest.approx((0.3 - 1) ** 2, rel=1e-5)
    assert ipo_sum_loss(**inputs, beta=0.5).loss[0] == pytest.approx((1.2 - 1) ** 2, rel=1e-5)


def test_hinge_stops_beyond_one():
    np.testing.assert_array_equal(slope_in_d(hinge_loss, [1.9, 2.1, 50.0], beta=0.5), [-0.5, 0.0, 0.0])


def test_forward_kl_is_capped_and_says_so():
    inputs = scalar_pair([-79.0, -81.0, -1e4])
    output = forward_kl_loss(**inputs, beta=0.1)
    np.testing.assert_array_equal(output.metrics["clipped"], [0.0, 0.5, 0.5])
    assert np.all(np.isfinite(output.loss))
    slope = slope_in_d(forward_kl_loss, [-79.0, -81.0, -1e4], beta=0.1)
    assert slope[0] < -1e30 and slope[1] == 0 and slope[2] == 0
    half = alpha_divergence_loss(**scalar_pair([-159.0, -161.0]), alpha=0.5).metrics["clipped"]
    np.testing.assert_array_equal(half, [0.0, 0.5])


def test_reference_free_is_dpo_with_zeros():
    arrays = float32(pairs())
    zeros = {name: jnp.zeros_like(v) if name.startswith("reference") else v for name, v in arrays.items()}
    free = {name: value for name, value in arrays.items() if not name.startswith("reference")}
    np.testing.assert_array_equal(reference_free_loss(**free).loss, dpo_loss(**zeros).loss)


def test_the_three_nll_normalisations_differ_and_agree_where_they_must():
    arrays = pairs()
    s_w, _, length, _, _, _ = sums(arrays)
    inputs = float32(arrays)
    plain = np.asarray(dpo_loss(**inputs).loss)

    def nll(loss):
        return np.asarray(loss(**inputs, beta=0.1, nll_coef=1.0).loss) - plain

    np.testing.assert_allclose(nll(rpo_sum_loss), -s_w, rtol=1e-5)
    np.testing.assert_allclose(nll(rpo_loss), -s_w / length, rtol=1e-5)
    assert nll(rpo_token_mean_loss).mean() == pytest.approx(-s_w.sum() / length.sum(), rel=1e-5)
    assert np.abs(nll(rpo_token_mean_loss) - nll(rpo_loss)).max() > 0.05
    for loss in (rpo_loss, rpo_sum_loss, rpo_token_mean_loss):
        np.testing.assert_allclose(loss(**inputs, beta=0.1, nll_coef=0.0).loss, plain, rtol=1e-6)


def test_token_mean_skips_empty_places():
    arrays = pairs()
    padded = {name: np.concatenate([value, np.zeros((3, T))]) for name, value in arrays.items()}
    whole = rpo_token_mean_loss(**float32(arrays)).loss
    np.testing.assert_allclose(rpo_token_mean_loss(**float32(padded)).loss[:B], whole, rtol=1e-6)


# TR-DPO and options


def test_tr_dpo_moves_the_reference():
    old = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(0.3)}
    new = {"w": jnp.array([-0.7, 5.1]), "b": jnp.array(7.0)}
    for rate, expected in ((0.0, old), (1.0, new)):
        moved = interpolate(old, new, rate)
        jax.tree.map(np.testing.assert_array_equal, moved, expected)
    np.testing.assert_allclose(interpolate(old, new, 0.6)["w"], [-0.02, 3.86], rtol=1e-5)


def test_tr_dpo_hard_update_restarts_the_loss_at_log_two():
    arrays = float32(pairs())
    policy = {side: arrays[f"policy_{side}_logps"] for side in ("chosen", "rejected")}
    reference = interpolate({side: arrays[f"reference_{side}_logps"] for side in policy}, policy, 1.0)
    moved = {**arrays, **{f"reference_{side}_logps": value for side, value in reference.items()}}
    np.testing.assert_allclose(dpo_loss(**moved).loss, LOG2, rtol=1e-6)
    assert np.any(np.abs(dpo_loss(**arrays).loss - LOG2) > 1e-2)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (dpo_loss, "beta", 0.0),
        (ipo_loss, "beta", float("inf")),
        (cdpo_loss, "label_smoothing", 0.6),
        (robust_loss, "label_smoothing", 0.5),
        (alpha_divergence_loss, "alpha", 0.0),
        (alpha_divergence_loss, "alpha", 1.0),
        (rdpo_loss, "alpha", -0.1),
        (rdpo_loss, "alpha", float("nan")),
        (rpo_loss, "nll_coef", -1.0),
        (rpo_token_mean_loss, "nll_coef", float("inf")),
    ],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(pairs()), **{name: value})


def test_an_option_of_another_member_is_not_ignored():
    with pytest.raises(TypeError, match="label_smoothing"):
        hinge_loss(**float32(pairs()), label_smoothing=0.1)


def test_batches_of_different_size_are_refused():
    arrays = float32(pairs())
    one = {name: value[:1] if "rejected" in name else value for name, value in arrays.items()}
    with pytest.raises(AssertionError):
        dpo_loss(**one)
