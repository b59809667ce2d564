"""BCO against float64 NumPy written from the formulas, its running shift, and its prompt classifier."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, gradients, log_ratio, sigmoid, softplus

from dpo_jax.language.methods.bco import (
    bco_loss,
    bco_state,
    bco_udm_loss,
    bco_udm_state,
    classify_prompts,
    density_ratio_weights,
    fit_prompt_classifier,
)


def singles(seed=0, rows=5) -> dict[str, np.ndarray]:
    return {**completions(("completion",), reference=True, seed=seed, rows=rows), "labels": np.arange(rows) % 2}


def shares(rows=5, seed=0):
    return np.random.default_rng([seed, 7]).uniform(0.02, 0.98, rows)


def state(mean, count) -> dict[str, Any]:
    return {"mean": jnp.float32(mean), "count": jnp.float32(count)}


def numpy_shift(a, beta, mean=0.0, count=0.0):
    rewards = beta * log_ratio(a, "completion")
    return (mean * count + rewards.sum()) / (count + len(rewards))


def numpy_bco(a, delta, beta, weights: Any = 1.0):
    reward = beta * log_ratio(a, "completion")
    return np.where(a["labels"] == 1, softplus(-(reward - delta)), weights * softplus(reward - delta))


def with_rewards(rewards, labels) -> dict[str, Any]:
    """One-token rows whose log ratios are the rewards (beta = 1)."""
    rewards = jnp.asarray(rewards, jnp.float32)[:, None]
    base = jnp.full_like(rewards, -3.0)
    rows = dict(policy_completion_logps=base + rewards, reference_completion_logps=base)
    return {**rows, "completion_mask": jnp.ones_like(base), "labels": jnp.asarray(labels, jnp.int32)}


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("before", [(0.0, 0.0), (0.7, 11.0)])
def test_bco_value_and_gradient(beta, before):
    arrays = singles()
    delta = numpy_shift(arrays, beta, *before)  # held fixed in the formula: no gradient flows through it
    loss = functools.partial(bco_loss, beta=beta, loss_state=state(*before))
    assert_formula(loss, lambda a: numpy_bco(a, delta, beta), arrays)
    output = loss(**float32(arrays))
    np.testing.assert_allclose(output.metrics["shift"], delta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(output.state["mean"], delta, rtol=1e-5, atol=1e-6)
    assert output.state["count"] == before[1] + 5


@pytest.mark.parametrize("bounds", [(0.5, 10.0), (0.9, 1.5)])
def test_bco_udm_value_and_gradient(bounds):
    arrays, beta = singles(1), 0.5
    p = np.array([0.3, 0.02, 0.9, 0.97, 0.55])
    low, high = bounds
    delta = numpy_shift(arrays, beta)
    weights = np.clip(p / (1 - p), low, high)
    options = dict(min_density_ratio=low, max_density_ratio=high)
    loss = functools.partial(bco_udm_loss, beta=beta, loss_state=bco_udm_state(), **options)
    loss = functools.partial(loss, prob_desirable=jnp.asarray(p, jnp.float32))
    assert_formula(loss, lambda a: numpy_bco(a, delta, beta, weights), arrays)
    expected = np.where(arrays["labels"] == 1, 1.0, weights)
    np.testing.assert_allclose(loss(**float32(arrays)).metrics["row_weight"], expected, rtol=1e-5)


def test_defaults_are_the_papers():
    arrays = singles()
    expected = numpy_bco(arrays, numpy_shift(arrays, 0.01), 0.01)
    np.testing.assert_allclose(bco_loss(**float32(arrays), loss_state=bco_state()).loss, expected, rtol=1e-5)


# The shift


def test_policy_equal_to_reference_gives_log_two():
    output = bco_loss(**with_rewards([0.0] * 4, [1, 0, 1, 1]), loss_state=bco_state(), beta=1.0)
    np.testing.assert_allclose(output.loss, np.log(2.0), rtol=1e-6)
    assert output.state["mean"] == 0 and output.state["count"] == 4


@pytest.mark.parametrize("constant", [-20.0, 3.0])
def test_the_first_shift_absorbs_a_constant(constant):
    rewards, labels = np.array([1.0, -2.0, 0.5, 0.3]), [1, 0, 0, 1]
    plain = bco_loss(**with_rewards(rewards, labels), loss_state=bco_state(), beta=0.5)
    moved = bco_loss(**with_rewards(rewards + constant, labels), loss_state=bco_state(), beta=0.5)
    np.testing.assert_allclose(moved.loss, plain.loss, rtol=1e-5)
    assert moved.state["mean"] - plain.state["mean"] == pytest.approx(0.5 * constant, rel=1e-5)


def test_the_shift_averages_all_rows_seen():
    rng = np.random.default_rng(3)
    batches = [rng.normal(1.0, 2.0, size) for size in (4, 4, 4, 5)]
    current, means = bco_state(), []
    for rewards in batches:
        output = bco_loss(**with_rewards(rewards, np.arange(len(rewards)) % 2), loss_state=current, beta=1.0)
        current = output.state
        means.append(float(current["mean"]))
    assert means[2] == pytest.approx(np.mean([b.mean() for b in batches[:3]]), rel=1e-5)  # equal sizes
    assert means[3] == pytest.approx(np.concatenate(batches).mean(), rel=1e-5)  # every row counts alike
    assert current["count"] == 17


def test_the_shift_does_not_forget_many_rows_to_rounding():
    output = bco_loss(**with_rewards([3.0] * 4, [1, 0, 1, 0]), loss_state=state(1.0, 1e6), beta=1.0)
    assert output.state["mean"] == pytest.approx(1 + 8e-6, abs=2e-7)


def test_order_inside_a_batch_does_not_matter():
    rewards, labels, order = np.array([1.0, -2.0, 0.5, 4.0]), np.array([1, 0, 0, 1]), [2, 0, 3, 1]
    there = bco_loss(**with_rewards(rewards, labels), loss_state=state(0.2, 3), beta=1.0)
    back = bco_loss(**with_rewards(rewards[order], labels[order]), loss_state=state(0.2, 3), beta=1.0)
    np.testing.assert_allclose(back.loss, there.loss[jnp.array(order)], rtol=1e-6)


def test_a_batch_of_empty_places_leaves_the_state():
    rows = with_rewards([5.0] * 4, [1, 0, 1, 0])
    rows["completion_mask"] = jnp.zeros_like(rows["completion_mask"])
    for before in (bco_state(), state(0.4, 9)):
        output = bco_loss(**rows, loss_state=before, beta=1.0)
        assert output.state["mean"] == before["mean"] and output.state["count"] == before["count"]
        assert np.all(np.isfinite(output.loss))


def test_slope_is_that_of_logistic_regression():
    arrays, beta = singles(2), 0.8
    reward = beta * log_ratio(arrays, "completion")
    error = sigmoid(reward - numpy_shift(arrays, beta)) - arrays["labels"]
    gradient = gradients(functools.partial(bco_loss, beta=beta, loss_state=bco_state()), arrays)
    expected = beta * error[:, None] * arrays["completion_mask"]
    np.testing.assert_allclose(gradient["policy_completion_logps"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("delta", [-30.0, -1.0, 0.0, 2.5, 40.0])
def test_the_pair_bounds_the_dpo_loss_whatever_the_shift(delta):
    a, b = np.meshgrid(np.linspace(-5, 5, 7), np.linspace(-5, 5, 7))
    rows = with_rewards(np.stack([a.ravel(), b.ravel()], 1).ravel(), [1, 0] * 49)
    output = bco_loss(**rows, loss_state=state(delta, 1e12), beta=1.0)  # a batch does not move such a mean
    assert output.metrics["shift"][0] == pytest.approx(delta, abs=1e-6)
    of_pair = np.asarray(output.loss).reshape(49, 2).sum(1)
    np.testing.assert_allclose(of_pair, (softplus(delta - a) + softplus(b - delta)).ravel(), rtol=1e-5)
    assert np.all(of_pair > softplus(b - a).ravel())


def test_accuracy_asks_for_the_side_of_the_shift():
    rows = with_rewards([3.0, 1.0, 3.0, 1.0], [1, 1, 0, 0])
    output = bco_loss(**rows, loss_state=bco_state(), beta=0.5)
    np.testing.assert_array_equal(output.metrics["accuracy"], [1, 0, 0, 1])
    np.testing.assert_allclose(output.metrics["reward"], [1.5, 0.5, 1.5, 0.5], rtol=1e-6)


# Density ratios


def test_density_ratios_touch_undesirable_rows_only_and_stay_in_bounds():
    p = jnp.array([0.0, 0.2, 0.5, 0.75, 0.99, 1.0])
    weights = density_ratio_weights(p, jnp.zeros(6, jnp.int32))
    np.testing.assert_allclose(weights, [0.5, 0.5, 1.0, 3.0, 10.0, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(density_ratio_weights(p, jnp.ones(6, jnp.int32)), 1.0)
    np.testing.assert_allclose(
        density_ratio_weights(p, jnp.zeros(6, jnp.int32), min_density_ratio=0.1, max_density_ratio=2.0),
        [0.1, 0.25, 1.0, 2.0, 2.0, 2.0],
        rtol=1e-6,
    )


def test_even_odds_are_bco():
    arrays = singles()
    half = jnp.full(5, 0.5)
    weighted = bco_udm_loss(**float32(arrays), prob_desirable=half, loss_state=bco_udm_state())
    np.testing.assert_allclose(weighted.loss, bco_loss(**float32(arrays), loss_state=bco_state()).loss, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(min_density_ratio=0.0), "min_density_ratio is 0.0"),
        (dict(max_density_ratio=float("inf")), "max_density_ratio is inf"),
        (dict(min_density_ratio=3.0, max_density_ratio=2.0), "min_density_ratio 3.0 is above"),
    ],
)
def test_bad_ratios_are_refused(options: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        density_ratio_weights(jnp.ones(2), jnp.ones(2, jnp.int32), **options)


# The prompt classifier


def numpy_slope(theta, embeddings, labels, inverse_penalty):
    """Gradient of the penalised, balanced objective in float64; zero at its only minimum."""
    features = np.column_stack([embeddings, np.ones(len(embeddings))])
    balance = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    error = balance * (sigmoid(features @ theta) - labels)
    return np.append(theta[:-1], 0.0) + inverse_penalty * features.T @ error


@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["overlapping", "separable", "skewed", "wide"])
def test_the_classifier_is_at_the_minimum(kind, inverse_penalty):
    rng = np.random.default_rng(5)
    n, d = (20, 30) if kind == "wide" else (120, 4)
    labels = (np.arange(n) < (5 if kind == "skewed" else n // 2)).astype(int)
    embeddings = rng.normal(0, 1, (n, d)) + np.outer(labels, np.ones(d)) * (6.0 if kind == "separable" else 0.5)
    fit = fit_prompt_classifier(jnp.asarray(embeddings), jnp.asarray(labels), inverse_penalty=inverse_penalty)
    theta = np.append(fit.coefficients, fit.intercept).astype(np.float64)
    scale = inverse_penalty * n  # of the terms that cancel there
    slope = numpy_slope(theta, np.asarray(embeddings, np.float32), labels, inverse_penalty)
    np.testing.assert_allclose(slope, 0.0, atol=3e-6 * max(scale, 1))


def test_balancing_makes_the_probability_independent_of_the_counts():
    """Without information in the embedding p is 1/2 even if one label is nine times as frequent."""
    embeddings, labels = jnp.zeros((100, 3)), jnp.asarray(np.arange(100) < 10, jnp.int32)
    fit = fit_prompt_classifier(embeddings, labels)
    np.testing.assert_allclose(classify_prompts(fit, embeddings), 0.5, atol=1e-6)


def test_the_classifier_finds_the_density_ratio_of_two_prompt_distributions():
    """Desirable rows come from context A to 80 %, undesirable ones to 20 %: the ratio is 4 in A and 1/4 in B."""
    contexts = np.concatenate([np.repeat([0, 1], [800, 200]), np.repeat([0, 1], [400, 1600])])
    labels = jnp.asarray(np.arange(3000) < 1000, jnp.int32)
    embeddings = jnp.eye(2)[contexts]
    p = classify_prompts(fit_prompt_classifier(embeddings, labels), embeddings)
    weights = density_ratio_weights(p, jnp.zeros_like(labels), min_density_ratio=0.1)
    np.testing.assert_allclose(weights, np.where(contexts == 0, 4.0, 0.25), rtol=0.02)
    reweighted = np.asarray(weights)[1000:]
    assert reweighted[contexts[1000:] == 0].sum() / reweighted.sum() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (np.zeros((4, 2)), np.ones(4), "4 prompts have one label"),
        (np.zeros((4, 2)), np.zeros(4), "one label"),
        (np.zeros((4, 2)), np.arange(3), r"give \[N, D\] and \[N\]"),
        (np.zeros(4), np.arange(4), r"give \[N, D\] and \[N\]"),
    ],
)
def test_classifiers_without_a_task_are_refused(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_prompt_classifier(embeddings, labels)
