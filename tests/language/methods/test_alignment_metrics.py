"""Metrics against float64 NumPy, enumeration and combinatorics, and the identities between them."""

import functools
import itertools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.alignment_metrics import (
    bandit_regret,
    best_of_n,
    best_of_n_kl,
    calibration,
    distinct_n,
    exact_divergences,
    k1_estimate,
    k2_estimate,
    k3_estimate,
    kl_sequence_mean,
    kl_token_mean,
    pass_at_k,
    preference_metrics,
    repetition,
    spearman,
    text_statistics,
)

B, T, V = 8, 5, 7
ESTIMATES = {"k1": k1_estimate, "k2": k2_estimate, "k3": k3_estimate}


def pairs(seed=0) -> dict[str, Any]:
    """Pairs with ragged masks; the last row is an empty place."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in ("chosen", "rejected"):
        arrays[f"reference_{side}_logps"] = -rng.gamma(2.0, 0.8, (B, T))
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(0, 0.6, (B, T))
        arrays[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
        arrays[f"{side}_mask"][-1] = 0
    return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}


def numpy_means(arrays, beta):
    a = {name: np.asarray(value, np.float64)[:-1] for name, value in arrays.items()}
    logps, ratio, length = {}, {}, {}
    for side in ("chosen", "rejected"):
        logps[side] = (a[f"policy_{side}_logps"] * a[f"{side}_mask"]).sum(-1)
        ratio[side] = logps[side] - (a[f"reference_{side}_logps"] * a[f"{side}_mask"]).sum(-1)
        length[side] = a[f"{side}_mask"].sum(-1)
    margin = beta * (ratio["chosen"] - ratio["rejected"])
    values = dict(
        margin=margin,
        accuracy=margin > 0,
        accuracy_half_ties=(margin > 0) + 0.5 * (margin == 0),
        preference_prob=1 / (1 + np.exp(-margin)),
    )
    for side in ("chosen", "rejected"):
        values |= {
            f"{side}_reward": beta * ratio[side],
            f"{side}_logps": logps[side],
            f"{side}_log_ratio": ratio[side],
            f"{side}_displaced": ratio[side] < 0,
            f"{side}_logps_per_token": logps[side] / length[side],
            f"{side}_length": length[side],
        }
    return {name: float(np.mean(value)) for name, value in values.items()}


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_training_metrics_are_means_over_the_examples_that_are_there(beta):
    arrays = pairs()
    sums = preference_metrics(**arrays, beta=beta)
    expected = numpy_means(arrays, beta)
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        assert sums[name].count == B - 1
        assert sums[name].total / sums[name].count == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_sums_of_parts_are_the_sums_of_the_whole():
    arrays = pairs(1)
    measure = functools.partial(preference_metrics, beta=0.3)
    parts = [measure(**{n: v[s] for n, v in arrays.items()}) for s in (slice(0, 3), slice(3, B))]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.tree.map(operator.add, *parts),
        measure(**arrays),
    )


def test_metrics_at_the_reference_and_no_gradient():
    arrays = pairs(2)
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in ("chosen", "rejected")}}
    means = {name: float(s.total / s.count) for name, s in preference_metrics(**same, beta=0.5).items()}
    assert means["chosen_reward"] == means["rejected_reward"] == means["margin"] == means["accuracy"] == 0
    assert means["accuracy_half_ties"] == means["preference_prob"] == 0.5

    def total(policy):
        return sum(s.total for s in preference_metrics(**{**arrays, "policy_chosen_logps": policy}, beta=0.5).values())

    assert not np.any(jax.grad(total)(arrays["policy_chosen_logps"]))


@pytest.mark.parametrize("tied", [False, True])
def test_spearman_is_the_correlation_of_mean_ranks(tied):
    rng = np.random.default_rng(3)
    a = rng.integers(0, 4, 20).astype(float) if tied else rng.normal(size=20)
    b = 0.5 * a + rng.normal(size=20)
    there = np.arange(20) < 17

    def mean_ranks(v):
        return np.array([np.sum(v < x) + (np.sum(v == x) + 1) / 2 for x in v])

    expected = np.corrcoef(mean_ranks(a[there]), mean_ranks(b[there]))[0, 1]
    a32, b32, mask = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.asarray(there)
    assert spearman(a32, b32, mask) == pytest.approx(expected, rel=1e-5)
    assert spearman(a32, -b32, mask) == pytest.approx(-expected, rel=1e-5)
    assert spearman(a32, jnp.exp(b32), mask) == pytest.approx(expected, rel=1e-5)  # only the order counts
    assert spearman(jnp.ones(20), b32, mask) == 0


def categoricals(seed=0, size=V, spread=0.5):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (2, size))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_estimates_against_the_formulas_and_in_expectation():
    log_p, log_q = categoricals()
    p, log_r = np.exp(log_p), log_q - log_p
    values = {name: np.asarray(f(*_tokens(log_p, log_q)))[0] for name, f in ESTIMATES.items()}
    np.testing.assert_allclose(values["k1"], -log_r, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["k2"], log_r**2 / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values["k3"], np.exp(log_r) - 1 - log_r, rtol=1e-4, atol=1e-6)
    kl = float(p @ (log_p - log_q))
    assert p @ values["k1"] == pytest.approx(kl, rel=1e-4) and p @ values["k3"] == pytest.approx(kl, rel=1e-4)
    assert abs(p @ values["k2"] - kl) > 0.01 * kl
    assert values["k1"].min() < 0 <= min(values["k2"].min(), values["k3"].min())


def _tokens(log_p, log_q):
    """Every word of the vocabulary as one sampled token, [1, V]."""
    policy, reference = (jnp.asarray(v, jnp.float32)[None] for v in (log_p, log_q))
    return policy, reference, jnp.ones_like(policy)


@pytest.mark.parametrize("name", ESTIMATES)
def test_pathwise_gradients_of_fixed_samples(name):
    log_p, log_q = categoricals(1)
    policy, reference, mask = _tokens(log_p, log_q)
    gradient = jax.grad(lambda x: ESTIMATES[name](x, reference, mask).sum())(policy)[0]
    expected = {"k1": np.ones(V), "k2": log_p - log_q, "k3": 1 - np.exp(log_q - log_p)}[name]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    # In expectation over the policy, by its logits: nothing, the gradient of KL(pi||ref), that of KL(ref||pi).
    p, q = np.exp(log_p), np.exp(log_q)
    jacobian = np.eye(V) - p  # d log p_v / d logit_u
    by_logits = (p * np.asarray(gradient, np.float64)) @ jacobian
    wanted = {"k1": np.zeros(V), "k2": p * (log_p - log_q - p @ (log_p - log_q)), "k3": p - q}[name]
    np.testing.assert_allclose(by_logits, wanted, atol=1e-6)
    assert not np.any(jax.grad(lambda x: ESTIMATES[name](policy, x, mask).sum())(reference))


def test_aggregations_leave_padding_out():
    rng = np.random.default_rng(0)
    policy, reference = -rng.gamma(2.0, 0.5, (2, 4, T))
    mask = jnp.arange(T) < jnp.array([5, 2, 1, 0])[:, None]
    k1 = np.where(mask, policy - reference, 0.0)
    policy, reference = (jnp.asarray(np.where(mask, v, np.nan), jnp.float32) for v in (policy, reference))
    for name, estimate in ESTIMATES.items():
        values, gradient = jax.value_and_grad(lambda x, f=estimate: kl_token_mean(f(x, reference, mask), mask))(policy)
        assert np.isfinite(values) and np.isfinite(gradient).all() and not gradient[~mask].any(), name
    values = k1_estimate(policy, reference, mask)
    assert kl_token_mean(values, mask) == pytest.approx(k1.sum() / float(mask.sum()), rel=1e-5)
    assert kl_sequence_mean(values, mask) == pytest.approx(k1.sum() / 3, rel=1e-5)  # three completions are there


def test_k3_stays_finite_far_from_the_reference():
    values = k3_estimate(jnp.array([-1000.0, 0.0]), jnp.array([0.0, -1000.0]), jnp.ones(2))
    np.testing.assert_allclose(values, [np.expm1(20) - 20, np.expm1(-20) + 20], rtol=1e-5)


def test_exact_divergences_against_numpy():
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (2, 3, V))
    p, q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    m = (p + q) / 2
    expected = dict(
        policy_to_reference=(p * np.log(p / q)).sum(-1),
        reference_to_policy=(q * np.log(q / p)).sum(-1),
        js=((p * np.log(p / m)).sum(-1) + (q * np.log(q / m)).sum(-1)) / 2,
        tv=np.abs(p - q).sum(-1) / 2,
        entropy=-(p * np.log(p)).sum(-1),
    )
    found = exact_divergences(*jnp.asarray(logits + 5.0, jnp.float32))  # a common shift changes nothing
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_divergences_of_equal_and_of_disjoint_distributions():
    low = -jnp.inf
    first, second = jnp.array([[0.0, 0.0, low, low]]), jnp.array([[low, low, 0.0, 0.0]])
    apart, same = exact_divergences(first, second), exact_divergences(first, first)
    assert apart.js[0] == pytest.approx(np.log(2)) and apart.tv[0] == 1 and np.isinf(apart.policy_to_reference[0])
    np.testing.assert_allclose([same.policy_to_reference[0], same.js[0], same.tv[0]], 0, atol=1e-7)
    assert same.entropy[0] == pytest.approx(np.log(2))


def test_pass_at_k_counts_subsets():
    n, c = 6, np.array([0, 1, 3, 6])
    for k in range(1, n + 1):
        expected = [
            np.mean([any(i < right for i in drawn) for drawn in itertools.combinations(range(n), k)]) for right in c
        ]
        np.testing.assert_allclose(pass_at_k(n, c, k=k), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pass_at_k(n, c, k=1), c / n)
    large = np.array([pass_at_k(10_000, 7, k=k) for k in (1, 10, 1000)])
    assert np.all(np.diff(large) > 0) and large[0] == pytest.approx(7e-4)
    assert large[2] == pytest.approx(1 - math.comb(9993, 1000) / math.comb(10_000, 1000), rel=1e-9)


def test_best_of_n_is_the_mean_over_subsets():
    rewards = np.random.default_rng(5).normal(size=(2, 6))
    for n in range(1, 7):
        expected = [np.mean([max(s) for s in itertools.combinations(row, n)]) for row in rewards]
        np.testing.assert_allclose(best_of_n(rewards, n=n), expected, rtol=1e-12)
    np.testing.assert_allclose(best_of_n(rewards, n=1), rewards.mean(-1))
    np.testing.assert_allclose(best_of_n(rewards, n=6), rewards.max(-1))
    assert np.isfinite(best_of_n(np.arange(5000.0), n=2500))


def test_best_of_n_kl_is_exact_for_many_actions():
    size, n = 20_000, 5  # the best of n of a uniform choice among ordered actions
    edges = (np.arange(size + 1) / size) ** n
    best = np.diff(edges)
    exact = float(np.sum(best * np.log(np.maximum(best, 1e-300) * size)))
    assert best_of_n_kl(n) == pytest.approx(exact, rel=1e-3) and best_of_n_kl(n) >= exact
    assert best_of_n_kl(1) == 0


def test_regret():
    rewards, probs = jnp.array([[1.0, 0.0, 3.0], [2.0, 2.0, 2.0]]), jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    np.testing.assert_allclose(bandit_regret(rewards, probs), [2.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_calibration_against_a_loop_over_bins(bins):
    rng = np.random.default_rng(6)
    p, y = rng.uniform(0, 0.9, 300), (rng.random(300) < 0.4).astype(float)
    gaps, sizes = [], []
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = (p > low) & (p <= high) | ((index == 0) & (p == 0))
        if inside.any():
            gaps.append(abs(p[inside].mean() - y[inside].mean()))
            sizes.append(inside.sum())
    found = calibration(p, y, bins=bins)
    assert found.ece == pytest.approx(np.dot(gaps, sizes) / 300)
    assert (found.mce, found.ace) == pytest.approx((max(gaps), np.mean(gaps)))
    assert found.brier == pytest.approx(np.mean((p - y) ** 2))
    assert found.log_loss == pytest.approx(-np.mean(np.log(np.where(y == 1, p, 1 - p))))
    assert found.ece <= found.mce <= 1


def test_calibration_at_the_ends():
    exact = calibration([0.0, 1.0, 1.0], [0, 1, 1])
    assert exact[:4] == (0, 0, 0, 0) and exact.log_loss == pytest.approx(1e-15, rel=0.2)
    wrong = calibration([1.0], [0])
    assert wrong.ece == wrong.brier == 1 and wrong.log_loss == pytest.approx(-math.log(1e-15), rel=0.01)
    assert calibration([0.5], [0.5], bins=2).ece == 0
    edge = calibration([0.5, 0.2], [0.0, 1.0], bins=2)  # 0.5 stands in the lower bin, where the errors cancel in part
    assert edge.ece == pytest.approx(abs(0.5 - 0.8) / 2)


def test_texts():
    found = text_statistics(["abcd", "", "ab"], truncated=[True, False, False])
    assert found == pytest.approx((2.0, 2.0, 2.0, 1 / 3, 1 / 3))
    assert math.isnan(text_statistics(["a"]).length_std)
    assert distinct_n(["a b a b", "a b"], n=2) == 2 / 4 and distinct_n(["a"], n=2) == 0
    assert repetition(["a b a b", "a b c", "a"], n=2) == pytest.approx((1 / 3 + 0) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preference_metrics(**pairs(), beta=0.0), "beta is 0"),
        (lambda: pass_at_k(3, 1, k=4), "k is 4"),
        (lambda: pass_at_k(3, 4, k=1), "4 of 3"),
        (lambda: best_of_n([1.0, 2.0], n=3), "n is 3"),
        (lambda: best_of_n_kl(0), "n is 0"),
        (lambda: calibration([0.5], [0.5, 1.0]), "1 probabilities, 2 labels"),
        (lambda: calibration([float("nan")], [1.0]), r"\[0, 1\]"),
        (lambda: text_statistics([]), "0 texts"),
        (lambda: distinct_n(["a b"], n=0), "n is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
