"""ORPO against float64 NumPy written from the formula, and the properties of its penalty."""

import functools

import jax
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, gradients, mean, one_token, sigmoid, softplus, total

from dpo_jax.language.methods.orpo import orpo_loss, orpo_token_mean_loss

SIDES = ("chosen", "rejected")


def pairs(seed=0):
    return completions(SIDES, reference=False, seed=seed)


def odds(m):
    return m - np.log(-np.expm1(m))


def numpy_penalty(a, beta):
    return softplus(-beta * (odds(mean(a, "chosen")) - odds(mean(a, "rejected"))))


def numpy_orpo(a, penalty_coef=0.1, beta=1.0):
    return -mean(a, "chosen") + penalty_coef * numpy_penalty(a, beta)


def numpy_token_mean(a, penalty_coef=0.1, beta=1.0):
    scale = len(a["chosen_mask"]) / a["chosen_mask"].sum()  # the mean over rows is the batch's token mean
    return -total(a, "chosen") * scale + penalty_coef * numpy_penalty(a, beta)


@pytest.mark.parametrize("options", [dict(), dict(penalty_coef=1.5, beta=0.4)], ids=["defaults", "tempered"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "formula"), [(orpo_loss, numpy_orpo), (orpo_token_mean_loss, numpy_token_mean)], ids=["orpo", "token_mean"]
)
def test_value_and_gradient(loss, formula, options, seed):
    assert_formula(functools.partial(loss, **options), functools.partial(formula, **options), pairs(seed))


def test_no_penalty_is_supervised_learning():
    arrays = pairs()
    output = orpo_loss(**float32(arrays), penalty_coef=0.0)
    np.testing.assert_allclose(output.loss, -mean(arrays, "chosen"), rtol=1e-6)
    slopes = gradients(functools.partial(orpo_loss, penalty_coef=0.0), arrays)
    assert not np.any(slopes["policy_rejected_logps"])


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_identical_answers_cost_log_two_and_their_gradients_cancel(beta):
    arrays = pairs()
    same = arrays | {n.replace("chosen", "rejected"): v for n, v in arrays.items() if "chosen" in n}
    np.testing.assert_allclose(orpo_loss(**float32(same), beta=beta).metrics["odds_ratio_loss"], np.log(2), rtol=1e-6)
    slopes = [gradients(functools.partial(orpo_loss, penalty_coef=c, beta=beta), same) for c in (0.0, 3.0)]
    penalty = [slopes[1][f"policy_{side}_logps"] - slopes[0][f"policy_{side}_logps"] for side in SIDES]
    assert np.abs(penalty[0]).max() > 1e-2
    np.testing.assert_allclose(penalty[0], -penalty[1], rtol=1e-5, atol=1e-6)


def test_doubling_every_token_changes_nothing():
    arrays = pairs()
    twice = {name: np.repeat(value, 2, axis=1) for name, value in arrays.items()}
    np.testing.assert_allclose(orpo_loss(**float32(twice)).loss, orpo_loss(**float32(arrays)).loss, rtol=1e-5)


def test_slopes_of_the_penalty():
    m_w, m_l = np.array([-0.01, -0.5, -3.0]), np.array([-2.0, -0.1, -3.5])
    inputs = one_token(m_w, m_l)
    z = odds(m_w) - odds(m_l)

    def penalty(chosen, rejected):
        moved = {**inputs, "policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
        return orpo_loss(**moved).metrics["odds_ratio_loss"].sum()

    slopes = jax.grad(penalty, (0, 1))(inputs["policy_chosen_logps"], inputs["policy_rejected_logps"])
    np.testing.assert_allclose(slopes[0][:, 0], -sigmoid(-z) / -np.expm1(m_w), rtol=1e-4)
    np.testing.assert_allclose(slopes[1][:, 0], sigmoid(-z) / -np.expm1(m_l), rtol=1e-4)


def test_unlikely_answers_have_simpos_penalty():
    m_w, m_l = np.array([-20.0, -25.0]), np.array([-21.5, -20.0])
    penalty = orpo_loss(**one_token(m_w, m_l)).metrics["odds_ratio_loss"]
    np.testing.assert_allclose(penalty, softplus(-(m_w - m_l)), rtol=1e-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -1e4), (-1e4, -1e-9)])
def test_certain_answers_stay_finite(chosen, rejected):
    inputs = one_token(chosen, rejected)
    value, slope = jax.value_and_grad(lambda p: orpo_loss(**{**inputs, "policy_chosen_logps": p}).loss.sum())(
        inputs["policy_chosen_logps"]
    )
    assert np.isfinite(value) and np.all(np.isfinite(slope))


def test_the_two_likelihoods_agree_on_the_batch_only_in_the_token_mean():
    arrays = pairs()
    rows, tokens = (loss(**float32(arrays)).metrics["nll"] for loss in (orpo_loss, orpo_token_mean_loss))
    assert np.mean(tokens) == pytest.approx(-total(arrays, "chosen").sum() / arrays["chosen_mask"].sum(), rel=1e-5)
    np.testing.assert_allclose(rows, -mean(arrays, "chosen"), rtol=1e-5)
    assert np.abs(np.mean(rows) - np.mean(tokens)) > 1e-2


def test_rewards_are_scaled_log_odds():
    arrays = pairs()
    metrics = orpo_loss(**float32(arrays), beta=0.5).metrics
    np.testing.assert_allclose(metrics["chosen_reward"], 0.5 * odds(mean(arrays, "chosen")), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["margin"], metrics["chosen_reward"] - metrics["rejected_reward"], rtol=1e-6)


@pytest.mark.parametrize("loss", [orpo_loss, orpo_token_mean_loss])
@pytest.mark.parametrize(("name", "value"), [("penalty_coef", -0.1), ("penalty_coef", float("nan")), ("beta", 0.0)])
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(pairs()), **{name: value})
