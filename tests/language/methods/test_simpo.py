"""SimPO, AlphaPO and SimPER against float64 NumPy written from the formulas, and the properties of their rewards."""

import functools

import jax
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, mean, one_token, sigmoid, softplus, value_and_gradients

from dpo_jax.language.methods.orpo import orpo_loss
from dpo_jax.language.methods.simpo import alphapo_loss, simper_loss, simpo_hinge_loss, simpo_loss


def pairs(seed=0):
    return completions(("chosen", "rejected"), reference=False, seed=seed)


def gap(a, reward=lambda m: m):
    return reward(mean(a, "chosen")) - reward(mean(a, "rejected"))


def numpy_simpo(a, beta=2.0, gamma=1.0, label_smoothing=0.0):
    x = beta * gap(a) - gamma
    return (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


def numpy_hinge(a, beta=2.0, gamma=1.0):
    return np.maximum(0, 1 - (beta * gap(a) - gamma))


def numpy_alphapo(a, beta=2.5, gamma=0.1, alpha=0.25):
    return softplus(-(beta * gap(a, lambda m: (1 - np.exp(-alpha * m)) / alpha) - gamma))


def numpy_simper(a):
    return -gap(a, np.exp)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "formula", "options"),
    [
        (simpo_loss, numpy_simpo, dict()),
        (simpo_loss, numpy_simpo, dict(beta=10.0, gamma=3.0, label_smoothing=0.2)),
        (simpo_hinge_loss, numpy_hinge, dict()),
        (simpo_hinge_loss, numpy_hinge, dict(beta=1.0, gamma=0.3)),
        (alphapo_loss, numpy_alphapo, dict()),
        (alphapo_loss, numpy_alphapo, dict(beta=0.7, gamma=0.5, alpha=-0.6)),
        (simper_loss, numpy_simper, dict()),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_value_and_gradient(loss, formula, options, seed):
    assert_formula(functools.partial(loss, **options), functools.partial(formula, **options), pairs(seed))


@pytest.mark.parametrize("beta", [2.0, 10.0])
def test_each_token_has_its_share_of_its_own_answers_slope(beta):
    arrays = pairs()
    x = beta * gap(arrays) - 1.0
    _, slopes = value_and_gradients(functools.partial(simpo_loss, beta=beta), arrays)
    for side, sign in (("chosen", -1), ("rejected", 1)):
        mask = arrays[f"{side}_mask"]
        per_token = sign * beta * sigmoid(-x) / mask.sum(-1)
        np.testing.assert_allclose(slopes[f"policy_{side}_logps"], per_token[:, None] * mask, rtol=1e-4, atol=1e-6)


LOSSES = [simpo_loss, simpo_hinge_loss, alphapo_loss, simper_loss]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sides", [("chosen",), ("rejected",), ("chosen", "rejected")], ids="-".join)
def test_doubling_the_tokens_of_an_answer_changes_nothing(loss, sides):
    arrays = pairs()
    padded = {name: np.pad(value, ((0, 0), (0, value.shape[1]))) for name, value in arrays.items()}
    for name in (n for n in arrays if any(side in n for side in sides)):
        padded[name] = np.repeat(arrays[name], 2, axis=1)
    np.testing.assert_allclose(loss(**float32(padded)).loss, loss(**float32(arrays)).loss, rtol=2e-5, atol=1e-6)


def test_identical_answers():
    arrays = float32(pairs())
    same = arrays | {n.replace("chosen", "rejected"): v for n, v in arrays.items() if "chosen" in n}
    np.testing.assert_allclose(simpo_loss(**same, gamma=0.0).loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(alphapo_loss(**same, gamma=0.0).loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(simpo_hinge_loss(**same, gamma=0.3).loss, 1.3, rtol=1e-6)
    np.testing.assert_array_equal(simper_loss(**same).loss, 0.0)
    assert np.all(simpo_loss(**same).metrics["order_agreement"] == 1) and not np.any(
        simpo_loss(**same).metrics["accuracy"]
    )


def test_gamma_is_the_margin_that_halves_the_likelihood():
    """The loss is log 2 where the reward gap is gamma: inside the sigmoid, not multiplied by beta."""
    np.testing.assert_allclose(simpo_loss(**one_token(-1.0, -1.75), beta=2.0, gamma=1.5).loss, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_hinge_stops_beyond_one_and_gamma(beta):
    inputs = one_token([-1.0] * 3, -1.0 - np.array([1.9, 2.1, 60.0]) / beta)
    slope = jax.grad(
        lambda p: simpo_hinge_loss(**{**inputs, "policy_chosen_logps": p}, beta=beta, gamma=1.0).loss.sum()
    )(inputs["policy_chosen_logps"])
    np.testing.assert_allclose(slope[:, 0], [-beta, 0.0, 0.0], rtol=1e-6)


# AlphaPO


@pytest.mark.parametrize("alpha", [1e-9, -1e-9])
def test_alphapo_reaches_simpo(alpha):
    arrays = float32(pairs())
    bent, straight = alphapo_loss(**arrays, alpha=alpha), simpo_loss(**arrays, beta=2.5, gamma=0.1)
    np.testing.assert_allclose(bent.loss, straight.loss, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(bent.metrics["margin"], straight.metrics["margin"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, -0.25])
def test_slope_of_alphapos_reward(alpha):
    m = np.array([-0.1, -2.0, -12.0])
    inputs = one_token(m, m)

    def reward(policy):
        moved = {**inputs, "policy_chosen_logps": policy}
        return alphapo_loss(**moved, beta=1.0, alpha=alpha).metrics["chosen_reward"].sum()

    slope = np.asarray(jax.grad(reward)(inputs["policy_chosen_logps"]))[:, 0]
    np.testing.assert_allclose(slope, np.exp(-alpha * m), rtol=1e-5)
    assert np.all(slope > 1 if alpha > 0 else slope < 1)


def test_alphapo_is_capped_and_says_so():
    inputs = one_token([-1.0, -330.0, -330.0], [-319.0, -321.0, -1.0])  # -alpha m: 0.25 / 79.75, 82.5 / 80.25, 82.5
    output = alphapo_loss(**inputs)
    np.testing.assert_array_equal(output.metrics["clipped"], [0.0, 1.0, 0.5])
    assert np.all(np.isfinite(output.loss)) and output.loss[0] == 0
    slope = jax.grad(lambda p: alphapo_loss(**{**inputs, "policy_chosen_logps": p}).loss.sum())(
        inputs["policy_chosen_logps"]
    )
    assert np.all(np.isfinite(slope)) and np.all(slope[1:] == 0)


# SimPER


def test_simper_is_bounded_and_leaves_unlikely_answers_alone():
    inputs = one_token([-1e-4, -50.0, -2.0], [-50.0, -1e-4, -3.0])
    loss = simper_loss(**inputs).loss
    assert np.all(np.abs(loss) < 1) and loss[0] < -0.999 and loss[1] > 0.999
    slope = jax.grad(lambda p: simper_loss(**{**inputs, "policy_chosen_logps": p}).loss.sum())(
        inputs["policy_chosen_logps"]
    )[:, 0]
    np.testing.assert_allclose(slope, -np.exp([-1e-4, -50.0, -2.0]), rtol=1e-5)


# Relations and metrics


def test_orpos_penalty_is_simpo_for_unlikely_answers():
    inputs = one_token([-20.0, -31.0], [-21.0, -30.0])
    penalty = orpo_loss(**inputs).metrics["odds_ratio_loss"]
    np.testing.assert_allclose(simpo_loss(**inputs, beta=1.0, gamma=0.0).loss, penalty, rtol=1e-6)


def test_order_agreement_tells_where_length_turns_the_order():
    arrays = float32(
        dict(
            policy_chosen_logps=np.array([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]),
            policy_rejected_logps=np.array([[-2.0, 0.0, 0.0], [-4.0, 0.0, 0.0]]),
            chosen_mask=np.ones((2, 3)),
            rejected_mask=np.array([[1.0, 0.0, 0.0]] * 2),
        )
    )
    for loss in LOSSES:
        metrics = loss(**arrays).metrics
        np.testing.assert_array_equal(metrics["order_agreement"], [0.0, 1.0])  # means -1 and -2, -4; sums -3 and -2, -4
        np.testing.assert_array_equal(metrics["accuracy"], 1.0)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (simpo_loss, "beta", 0.0),
        (simpo_loss, "label_smoothing", 0.6),
        (simpo_hinge_loss, "gamma", float("inf")),
        (alphapo_loss, "alpha", 0.0),
        (alphapo_loss, "alpha", float("nan")),
    ],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(pairs()), **{name: value})
