"""ASFT against float64 NumPy written from the log-sigmoids of its paper, and the properties of the absolute terms."""

import functools

import jax
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, gradients, mean, one_token, sigmoid, softplus

from dpo_jax.language.methods.asft import asft_loss, asft_tempered_loss
from dpo_jax.language.methods.orpo import orpo_loss


def pairs(seed=0):
    return completions(("chosen", "rejected"), reference=False, seed=seed)


def odds(m):
    return m - np.log(-np.expm1(m))


def numpy_tempered(a, beta=0.1):
    return softplus(-beta * odds(mean(a, "chosen"))) + softplus(beta * odds(mean(a, "rejected")))


def numpy_asft(a, align_coef=1.0, nll_coef=1.0):
    """With the log-sigmoids as the paper writes them, not the simplified form of the module."""
    return -nll_coef * mean(a, "chosen") + align_coef * numpy_tempered(a, beta=1.0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", [dict(), dict(align_coef=0.3, nll_coef=0.7), dict(nll_coef=0.0)], ids=str)
def test_asft_value_and_gradient(options, seed):
    assert_formula(functools.partial(asft_loss, **options), functools.partial(numpy_asft, **options), pairs(seed))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", [dict(), dict(beta=1.0), dict(beta=0.001)], ids=str)
def test_tempered_value_and_gradient(options, seed):
    formula = functools.partial(numpy_tempered, **options)
    assert_formula(functools.partial(asft_tempered_loss, **options), formula, pairs(seed))


def test_tempered_at_one_is_the_alignment_term_alone():
    arrays = float32(pairs())
    alone = asft_loss(**arrays, nll_coef=0.0)
    np.testing.assert_allclose(asft_tempered_loss(**arrays, beta=1.0).loss, alone.loss, rtol=1e-5)
    np.testing.assert_array_equal(alone.loss, alone.metrics["align_loss"])


def test_no_alignment_is_supervised_learning():
    arrays = pairs()
    np.testing.assert_allclose(asft_loss(**float32(arrays), align_coef=0.0).loss, -mean(arrays, "chosen"), rtol=1e-6)
    slopes = gradients(functools.partial(asft_loss, align_coef=0.0), arrays)
    assert not np.any(slopes["policy_rejected_logps"])


def test_alignment_is_binary_cross_entropy():
    p_w, p_l = np.array([0.1, 0.5, 0.9]), np.array([0.3, 0.5, 0.99])
    align = asft_loss(**one_token(np.log(p_w), np.log(p_l))).metrics["align_loss"]
    np.testing.assert_allclose(align, -np.log(p_w) - np.log(1 - p_l), rtol=1e-5)
    assert align[1] == pytest.approx(2 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("loss", [asft_loss, asft_tempered_loss])
def test_neither_answer_feels_the_other(loss):
    arrays, other = pairs(0), pairs(1)
    for side, rest in (("chosen", "rejected"), ("rejected", "chosen")):
        mixed = arrays | {name: value for name, value in other.items() if rest in name}
        there, here = (gradients(loss, a)[f"policy_{side}_logps"] for a in (arrays, mixed))
        assert np.any(there)
        np.testing.assert_array_equal(there, here)


def slopes(loss, m_w, m_l):
    inputs = one_token(m_w, m_l)

    def summed(chosen, rejected):
        return loss(**{**inputs, "policy_chosen_logps": chosen, "policy_rejected_logps": rejected}).loss.sum()

    found = jax.grad(summed, (0, 1))(inputs["policy_chosen_logps"], inputs["policy_rejected_logps"])
    return [np.asarray(slope)[:, 0] for slope in found]


def test_slopes_push_a_likely_rejected_answer_only():
    m = np.array([-60.0, -9.0, -0.7, -0.01, -1e-4])
    chosen, rejected = slopes(functools.partial(asft_loss, nll_coef=0.0), m, m)
    np.testing.assert_allclose(chosen, -1.0, rtol=1e-6)
    np.testing.assert_allclose(rejected, np.exp(m) / -np.expm1(m), rtol=1e-4)
    assert rejected[0] < 1e-25 and rejected[-1] > 9e3


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_slopes_of_the_tempered_form(beta):
    m = np.array([-9.0, -0.7, -0.01])
    chosen, rejected = slopes(functools.partial(asft_tempered_loss, beta=beta), m, m)
    np.testing.assert_allclose(chosen, -beta * sigmoid(-beta * odds(m)) / -np.expm1(m), rtol=1e-4)
    np.testing.assert_allclose(rejected, beta * sigmoid(beta * odds(m)) / -np.expm1(m), rtol=1e-4)


def test_alignment_is_orpos_penalty_and_more():
    p_w, p_l = (p.ravel() for p in np.meshgrid(np.linspace(0.02, 0.98, 9), np.linspace(0.02, 0.98, 9)))
    inputs = one_token(np.log(p_w), np.log(p_l))
    align, penalty = asft_loss(**inputs).metrics["align_loss"], orpo_loss(**inputs).metrics["odds_ratio_loss"]
    np.testing.assert_allclose(penalty, align + np.log(p_w * (1 - p_l) + p_l * (1 - p_w)), rtol=1e-4, atol=1e-5)
    assert np.all(penalty < align)


def test_orpo_and_alignment_meet_at_certainty():
    inputs = one_token([-1e-4], [-15.0])
    align, penalty = asft_loss(**inputs).metrics["align_loss"][0], orpo_loss(**inputs).metrics["odds_ratio_loss"][0]
    assert 0 <= penalty <= align < 2e-4


def test_doubling_every_token_changes_nothing_and_losses_are_not_negative():
    arrays = pairs()
    twice = {name: np.repeat(value, 2, axis=1) for name, value in arrays.items()}
    for loss in (asft_loss, asft_tempered_loss):
        once = loss(**float32(arrays)).loss
        np.testing.assert_allclose(loss(**float32(twice)).loss, once, rtol=1e-5)
        assert np.all(once >= 0)


@pytest.mark.parametrize("loss", [asft_loss, asft_tempered_loss])
@pytest.mark.parametrize(("m_w", "m_l"), [(0.0, 0.0), (-1e-9, -1e4), (-1e4, -1e-9)])
def test_certain_answers_stay_finite(loss, m_w, m_l):
    assert np.all(np.isfinite(loss(**one_token(m_w, m_l)).loss)) and np.all(np.isfinite(slopes(loss, m_w, m_l)))


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (asft_loss, "align_coef", -1.0),
        (asft_loss, "align_coef", float("inf")),
        (asft_loss, "nll_coef", float("nan")),
        (asft_tempered_loss, "beta", 0.0),
    ],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(pairs()), **{name: value})
