"""InfoNCA, NCA and EXO over lists against float64 NumPy, absent answers, and their pairwise limits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import assert_formula, float32, pairs, sigmoid

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.dpo_variants import exo_pair_loss, nca_pair_loss
from dpo_jax.language.methods.listwise_nca import exo_reward_loss, infonca_loss, nca_loss

B, K, T = 4, 4, 5
LOSSES = [infonca_loss, nca_loss, exo_reward_loss]


def lists(seed=0):
    """Float64 lists of 4, 3, 2 and 1 answers; the first answer of the second row is the absent one."""
    rng = np.random.default_rng(seed)
    reference = -rng.gamma(2.0, 0.8, (B, K, T))
    mask = (np.arange(T) < rng.integers(1, T + 1, (B, K, 1))).astype(float)
    mask[1, 0], mask[2, [1, 3]], mask[3, :3] = 0, 0, 0
    scores = rng.normal(5.0, 2.0, (B, K))
    scores[0, 1] = scores[0, 2]
    policy = reference + rng.normal(0, 0.5, (B, K, T))
    return dict(policy_logps=policy, reference_logps=reference, mask=mask, scores=scores)


def per_row(row):
    """Apply a formula of one row (rewards s, target q, both of the answers that are there) to every row."""

    def formula(a, beta, reward_temperature):
        u = ((a["policy_logps"] - a["reference_logps"]) * a["mask"]).sum(-1)
        out = []
        for k in range(len(u)):
            there = a["mask"][k].any(-1)
            weights = np.exp((a["scores"][k] - a["scores"][k][there].max()) / reward_temperature)[there]
            out.append(row(beta * u[k][there], weights / weights.sum()))
        return np.array(out)

    return formula


def softmax(s):
    return np.exp(s) / np.exp(s).sum()


def infonca_row(s, q):
    return -(q * np.log(softmax(s))).sum()


def nca_row(s, q):
    return -(q * np.log(sigmoid(s))).sum() - np.log(sigmoid(-s)).mean()


def exo_row(s, q):
    return (softmax(s) * np.log(softmax(s) / q)).sum()


FORMULAS = dict(zip(LOSSES, map(per_row, (infonca_row, nca_row, exo_row))))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("beta", "reward_temperature"), [(0.7, 1.0), (0.2, 3.0)])
def test_value_and_gradient_against_the_formula(loss, beta, reward_temperature):
    options = dict(beta=beta, reward_temperature=reward_temperature)
    assert_formula(loss, functools.partial(FORMULAS[loss], **options), lists(), **options)


def test_defaults_are_the_papers():
    arrays = lists(1)
    for loss, beta, reward_temperature in [
        (infonca_loss, 0.01, 1.0),
        (nca_loss, 0.01, 1.0),
        (exo_reward_loss, 0.5, 0.5),
    ]:
        expected = FORMULAS[loss](arrays, beta, reward_temperature)
        np.testing.assert_allclose(loss(**float32(arrays)).loss, expected, rtol=2e-5, atol=1e-6)


def two(arrays):
    """The pairs as lists of two, the chosen answer first and far better scored: a one-hot target."""
    both = {
        f"{model}_logps": np.stack([arrays[f"{model}_chosen_logps"], arrays[f"{model}_rejected_logps"]], 1)
        for model in ("policy", "reference")
    }
    mask = np.stack([arrays["chosen_mask"], arrays["rejected_mask"]], 1)
    return float32({**both, "mask": mask, "scores": np.tile([100.0, 0.0], (len(mask), 1))})


@pytest.mark.parametrize(("loss", "pairwise"), [(infonca_loss, dpo_loss), (nca_loss, nca_pair_loss)])
def test_two_answers_and_a_one_hot_target_are_the_pairwise_loss(loss, pairwise):
    arrays = pairs()
    expected = pairwise(**float32(arrays), beta=0.6)
    output = loss(**two(arrays), beta=0.6)
    np.testing.assert_allclose(output.loss, expected.loss, rtol=1e-6)
    np.testing.assert_array_equal(output.metrics["accuracy"], expected.metrics["accuracy"])
    np.testing.assert_allclose(output.metrics["best_reward"], expected.metrics["chosen_reward"], rtol=1e-6)
    np.testing.assert_allclose(output.metrics["best_log_ratio"], expected.metrics["chosen_log_ratio"], rtol=1e-6)


def test_exo_of_two_answers_is_exo_on_the_pair_with_the_targets_smoothing():
    arrays, e = pairs(), 0.2
    inputs = two(arrays) | {"scores": jnp.tile(jnp.array([np.log((1 - e) / e), 0.0]), (5, 1))}
    expected = exo_pair_loss(**float32(arrays), beta=0.6, label_smoothing=e).loss
    actual = exo_reward_loss(**inputs, beta=0.6, reward_temperature=1.0).loss
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def at_rewards(s) -> dict[str, Any]:
    """One row of one-token answers with implicit rewards s at beta 1."""
    s = jnp.asarray(s, jnp.float32)[None, :, None]
    return dict(policy_logps=s - 9, reference_logps=jnp.full_like(s, -9.0), mask=jnp.ones_like(s))


def test_minima_are_at_the_target():
    scores = jnp.array([[1.0, -0.5, 2.0]])
    q = softmax(np.asarray(scores, float)[0])
    entropy = -(q * np.log(q)).sum()

    def gradient(loss, s):
        inputs = at_rewards(s)
        options: dict[str, Any] = dict(scores=scores, beta=1.0, reward_temperature=1.0)
        of = jax.jit(jax.grad(lambda p: loss(**{**inputs, "policy_logps": p}, **options).loss.sum()))
        return np.asarray(of(inputs["policy_logps"])), float(loss(**inputs, **options).loss[0])

    # InfoNCA and EXO fix the rewards up to a constant, NCA fixes them: sigma(s) = q / (q + 1/K).
    for loss, s, minimum in [
        (infonca_loss, np.log(q) + 1.7, entropy),
        (exo_reward_loss, np.log(q) - 2.3, 0.0),
        (nca_loss, np.log(3 * q), None),
    ]:
        slope, value = gradient(loss, s)
        np.testing.assert_allclose(slope, 0.0, atol=1e-6, err_msg=loss.__name__)
        assert minimum is None or value == pytest.approx(minimum, abs=1e-6)
    assert np.abs(gradient(nca_loss, np.log(3 * q) + 1.0)[0]).min() > 1e-2


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_absent_answers_are_as_if_they_had_never_been(loss):
    arrays, options = lists(2), dict(beta=0.5, reward_temperature=1.5)
    spoiled = {name: value.copy() for name, value in arrays.items()}
    absent = ~arrays["mask"].any(-1)
    spoiled["scores"][absent] = np.resize([np.nan, np.inf, 1e30], absent.sum())
    spoiled["policy_logps"][absent] = np.nan
    run = jax.jit(functools.partial(loss, **options))
    clean, output = run(**float32(arrays)), run(**float32(spoiled))
    np.testing.assert_array_equal(output.loss, clean.loss)
    for name, value in clean.metrics.items():
        np.testing.assert_array_equal(output.metrics[name], value, err_msg=name)
    row = {name: value[1:2, 1:] for name, value in arrays.items()}  # the second row without its absent first answer
    np.testing.assert_allclose(loss(**float32(row), **options).loss, clean.loss[1:2], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_empty_rows_and_lists_of_one(loss):
    arrays = {name: value.copy() for name, value in lists().items()}
    arrays["mask"][0] = 0
    output = loss(**float32(arrays), beta=0.5)
    assert output.loss[0] == 0 and all(value[0] == 0 for value in output.metrics.values())
    if loss is not nca_loss:  # there is nothing to choose from
        assert output.loss[3] == 0
    else:
        assert output.loss[3] > LOG4 - 1e-6  # softplus(s) + softplus(-s)


LOG4 = np.log(4.0)


def test_metrics():
    scores = jnp.array([[3.0, 1.0, 3.0, 0.0]])
    output = infonca_loss(**at_rewards([0.5, 1.0, 2.0, -4.0]), scores=scores, beta=1.0)
    # Pairs by score: 0>1 wrong, 0>3, 2>1, 2>3 and 1>3 right; the best are the first and the third.
    assert float(output.metrics["accuracy"][0]) == pytest.approx(0.8)
    assert float(output.metrics["best_reward"][0]) == pytest.approx(1.25)
    assert float(output.metrics["mean_reward"][0]) == pytest.approx(-0.125)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("name", "value"), [("beta", 0.0), ("reward_temperature", 0.0), ("reward_temperature", -1.0)])
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**float32(lists()), **{name: value})
