"""Flex-DPO and the diagnostics of DPO against float64 NumPy and automatic differentiation; the three D's on a toy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import central_differences, float32, gradients, pairs

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.three_d_properties import dpo_dynamics, flex_dpo_loss, unseen_drift

B, T = 5, 6
SIDES = ("chosen", "rejected")


def log_ratios(a):
    return [((a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1) for s in SIDES]


def numpy_flex(a, beta_plus, beta_minus, sft_coef):
    u, v = log_ratios(a)
    nll = -(a["policy_chosen_logps"] * a["chosen_mask"]).sum(-1) / a["chosen_mask"].sum(-1)
    return np.logaddexp(0.0, -(beta_plus * u - beta_minus * v)) + sft_coef * nll


@pytest.mark.parametrize(
    "options",
    [
        dict(beta_plus=0.1, beta_minus=0.08, sft_coef=0.0),
        dict(beta_plus=1.0, beta_minus=0.3, sft_coef=0.4),
        dict(beta_plus=0.5, beta_minus=0.0, sft_coef=0.0),
    ],
    ids=str,
)
def test_value_and_gradient_against_the_formula(options):
    arrays = pairs()
    function, loss = functools.partial(numpy_flex, **options), functools.partial(flex_dpo_loss, **options)
    np.testing.assert_allclose(loss(**float32(arrays)).loss, function(arrays), rtol=2e-5)
    for name, gradient in gradients(loss, arrays).items():
        np.testing.assert_allclose(gradient, central_differences(function, arrays, name), rtol=1e-4, atol=1e-6)


def test_defaults_are_the_papers():
    arrays = pairs(1)
    np.testing.assert_allclose(flex_dpo_loss(**float32(arrays)).loss, numpy_flex(arrays, 0.1, 0.08, 0.0), rtol=2e-5)


def test_equal_betas_are_dpo():
    arrays = pairs(2)
    flex, dpo = functools.partial(flex_dpo_loss, beta_plus=0.4, beta_minus=0.4), functools.partial(dpo_loss, beta=0.4)
    np.testing.assert_allclose(flex(**float32(arrays)).loss, dpo(**float32(arrays)).loss, rtol=1e-6, atol=1e-7)
    expected = gradients(dpo, arrays)
    for name, gradient in gradients(flex, arrays).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_logit_gradients_keep_the_ratio_of_the_betas():
    arrays, beta_plus, beta_minus = pairs(3), 0.6, 0.2
    loss = functools.partial(flex_dpo_loss, beta_plus=beta_plus, beta_minus=beta_minus)
    coefficient = np.asarray(loss(**float32(arrays)).metrics["coefficient"])
    u, v = log_ratios(arrays)
    np.testing.assert_allclose(coefficient, 1 / (1 + np.exp(beta_plus * u - beta_minus * v)), rtol=1e-5)
    gradient = gradients(loss, arrays)
    for side, scale in (("chosen", -beta_plus), ("rejected", beta_minus)):
        expected = scale * coefficient[:, None] * arrays[f"{side}_mask"]
        np.testing.assert_allclose(gradient[f"policy_{side}_logps"], expected, rtol=1e-5, atol=1e-7)


def test_no_gradient_reaches_the_rejected_side_without_beta_minus():
    gradient = gradients(functools.partial(flex_dpo_loss, beta_minus=0.0), pairs(4))
    assert np.all(gradient["policy_rejected_logps"] == 0) and np.any(gradient["policy_chosen_logps"] != 0)


def test_start_is_log_two_plus_the_sft_term():
    arrays = pairs(5, spread=0.0)
    output = flex_dpo_loss(**float32(arrays), sft_coef=0.3)
    np.testing.assert_allclose(output.loss - 0.3 * output.metrics["nll"], np.log(2.0), rtol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("beta_plus", 0.0), ("beta_minus", -0.1), ("sft_coef", float("inf"))])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        flex_dpo_loss(**float32(pairs()), **{name: value})


# Diagnostics


def one_token(log_pi_w, log_pi_l, log_ref_w=-2.0, log_ref_l=-2.0):
    column = functools.partial(jnp.full, (1, 1))
    return dict(
        policy_chosen_logps=column(log_pi_w),
        policy_rejected_logps=column(log_pi_l),
        reference_chosen_logps=column(log_ref_w),
        reference_rejected_logps=column(log_ref_l),
        chosen_mask=column(1.0),
        rejected_mask=column(1.0),
    )


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize(("p_w", "p_l"), [(0.4, 0.3), (0.05, 0.6), (0.7, 1e-4)])
def test_probability_gradients_equal_autodiff(beta, p_w, p_l):
    def loss(probabilities):
        return dpo_loss(**one_token(*jnp.log(probabilities)), beta=beta).loss[0]

    d_w, d_l = jax.grad(loss)(jnp.array([p_w, p_l]))
    dynamics = dpo_dynamics(**one_token(np.log(p_w), np.log(p_l)), beta=beta)
    assert d_w < 0 < d_l
    assert float(jnp.exp(dynamics["chosen_log_gradient"][0])) == pytest.approx(-float(d_w), rel=1e-4)
    assert float(jnp.exp(dynamics["rejected_log_gradient"][0])) == pytest.approx(float(d_l), rel=1e-4)
    assert float(d_l / d_w) == pytest.approx(-p_w / p_l, rel=1e-4)
    assert float(jnp.exp(dynamics["log_gradient_ratio"][0])) == pytest.approx(p_w / p_l, rel=1e-4)


def test_the_chosen_gradient_vanishes_and_the_rejected_one_explodes():
    beta, log_p = 0.5, [-5.0, -25.0, -45.0]
    values = [dpo_dynamics(**one_token(-1.0, low), beta=beta) for low in log_p]
    chosen = [float(value["chosen_log_gradient"][0]) for value in values]
    rejected = [float(value["rejected_log_gradient"][0]) for value in values]
    assert chosen[0] > chosen[1] > chosen[2] and rejected[0] < rejected[1] < rejected[2]
    # Far out |dL/dpi_l| goes as pi_l^(beta - 1) and |dL/dpi_w| as pi_l^beta.
    assert rejected[2] - rejected[1] == pytest.approx((beta - 1) * -20, rel=1e-3)
    assert chosen[2] - chosen[1] == pytest.approx(beta * -20, rel=1e-3)


def test_dynamics_of_ragged_answers_stay_finite_far_out():
    arrays = pairs(6)
    u, v = log_ratios(arrays)
    dynamics = dpo_dynamics(**float32(arrays), beta=0.3)
    np.testing.assert_allclose(dynamics["chosen_log_ratio"], u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dynamics["rejected_log_ratio"], v, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dynamics["coefficient"], 1 / (1 + np.exp(0.3 * (u - v))), rtol=1e-4)
    for values in (one_token(-1e4, -1.0), one_token(-1.0, -1e4)):
        assert all(np.all(np.isfinite(value)) for value in dpo_dynamics(**values).values())
    with pytest.raises(ValueError, match="beta is -1"):
        dpo_dynamics(**float32(arrays), beta=-1)


def test_unseen_drift_is_a_mean_over_answers_that_are_there():
    policy = jnp.array([[[-1.0, -2.0], [-3.0, jnp.nan], [jnp.nan, jnp.nan]], [[jnp.nan] * 2] * 3])
    reference = jnp.full((2, 3, 2), -2.0)
    mask = jnp.array([[[1, 1], [1, 0], [0, 0]], [[0, 0]] * 3])
    drift = unseen_drift(policy_logps=policy, reference_logps=reference, mask=mask)
    np.testing.assert_allclose(drift, [0.0, 0.0])  # (1 + -1) / 2, and none
    drift = unseen_drift(policy_logps=policy, reference_logps=reference - 1, mask=mask)
    np.testing.assert_allclose(drift, [1.5, 0.0])  # (3 + 0) / 2


# The three D's: 4 prompts, 10 one-token answers with fixed shared features, only the prompts' vectors learn.

PROMPTS, ANSWERS, FEATURES = 4, 10, 4
DPO = functools.partial(dpo_loss, beta=0.1)
FLEX_NEAR = functools.partial(flex_dpo_loss, beta_minus=0.08)
FLEX_FAR = functools.partial(flex_dpo_loss, beta_minus=0.02)
FLEX_SFT = functools.partial(flex_dpo_loss, beta_minus=0.1, sft_coef=0.02)


def toy(seed):
    """Fixed features of the answers, vectors of the prompts next to their chosen answers, and the pairs."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(ANSWERS, FEATURES))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    chosen = np.arange(PROMPTS)
    rejected = chosen + PROMPTS
    for w, l in zip(chosen, rejected, strict=True):
        other = rng.normal(size=FEATURES)
        features[l] = 0.9 * features[w] + 0.45 * other / np.linalg.norm(other)
        features[l] /= np.linalg.norm(features[l])
    start = 2.0 * features[chosen] + 0.1 * rng.normal(size=(PROMPTS, FEATURES))
    return jnp.asarray(features, jnp.float32), jnp.asarray(start, jnp.float32), chosen, rejected


@functools.partial(jax.jit, static_argnames=("loss",))
def probabilities_after_training(loss, features, start, chosen, rejected):
    """Mean probabilities (chosen, rejected, unseen) before and after 500 steps of gradient descent."""
    reference = jax.nn.log_softmax(start @ features.T)
    rows = jnp.arange(PROMPTS)

    def total(vectors):
        logp = jax.nn.log_softmax(vectors @ features.T)
        arrays = {"chosen_mask": jnp.ones((PROMPTS, 1)), "rejected_mask": jnp.ones((PROMPTS, 1))}
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            arrays |= {f"policy_{side}_logps": logp[rows, answer][:, None]}
            arrays |= {f"reference_{side}_logps": reference[rows, answer][:, None]}
        return loss(**arrays).loss.sum()

    def summary(vectors):
        p = jax.nn.softmax(vectors @ features.T)
        seen = jnp.array([p[rows, chosen].mean(), p[rows, rejected].mean()])
        return jnp.append(seen, 1 - seen.sum())

    end = jax.lax.fori_loop(0, 500, lambda _, vectors: vectors - 2.0 * jax.grad(total)(vectors), start)
    return summary(start), summary(end)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_shows_the_three_ds_and_flex_dpo_or_sft_holds_the_chosen_answer(seed):
    case = toy(seed)
    start, dpo = probabilities_after_training(DPO, *case)
    assert dpo[1] < 0.05 * start[1], "drastic drop of the rejected answer"
    assert dpo[0] < 0.2 * start[0], "degradation of the chosen one"
    assert dpo[2] > 0.9, "dispersion onto the unseen ones"
    near, far, sft = (probabilities_after_training(loss, *case)[1] for loss in (FLEX_NEAR, FLEX_FAR, FLEX_SFT))
    assert dpo[0] + 0.2 < near[0] < far[0] and far[0] > 2 * start[0]
    assert sft[0] > start[0] and sft[1] < 0.1 * start[1]
