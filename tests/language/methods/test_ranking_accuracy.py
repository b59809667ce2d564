"""Ranking accuracy against float64 NumPy, and the paper's equivalences."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import float32

from dpo_jax.language.methods.ranking_accuracy import (
    PAPER_BETAS,
    difficulty,
    flip_threshold,
    gamma_dpo_loss,
    ideal_log_ratio,
    idealized_ranking_accuracy,
    idealized_ranking_range,
    ipo_flip_threshold,
    max_beta_for_ideal,
    ranked_lists,
    ranking_metrics,
    reference_log_ratio,
    reference_log_ratio_per_token,
)

B, T = 12, 6


def pairs(seed=0, spread=0.8):
    return numeric.pairs(seed, spread, rows=B, tokens=T)


def total(arrays, name):
    return (arrays[f"{name}_logps"] * arrays[f"{name.split('_')[1]}_mask"]).sum(-1)


def mean(arrays, name):
    return total(arrays, name) / arrays[f"{name.split('_')[1]}_mask"].sum(-1)


def c_of(arrays):
    return total(arrays, "reference_rejected") - total(arrays, "reference_chosen")


def reference_only(arrays) -> dict[str, Any]:
    return {name: value for name, value in float32(arrays).items() if not name.startswith("policy")}


def numpy_gamma_dpo(arrays, beta, gamma):
    gap = total(arrays, "policy_chosen") - total(arrays, "policy_rejected")
    return np.logaddexp(0, -beta * (gap + gamma * c_of(arrays)))


def slope_by(loss, arrays, name):
    return jax.grad(lambda policy: loss(**{**float32(arrays), name: policy}).loss.sum())(float32(arrays)[name])


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 1.0), (0.7, 0.5), (0.3, 0.0), (0.2, 2.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_against_the_formula(beta, gamma, seed):
    arrays = pairs(seed)
    loss = functools.partial(gamma_dpo_loss, beta=beta, gamma=gamma)
    expected = numpy_gamma_dpo(arrays, beta, gamma)
    output = loss(**float32(arrays))
    np.testing.assert_allclose(output.loss, expected, rtol=2e-5, atol=1e-6)
    slope = -beta * -np.expm1(-expected)  # -beta sigma(-x), and sigma(-x) = 1 - exp(-loss)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        gradient = slope_by(loss, arrays, f"policy_{side}_logps")
        np.testing.assert_allclose(gradient, sign * slope[:, None] * arrays[f"{side}_mask"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(output.metrics["margin"], -np.log(np.expm1(expected)), rtol=1e-3, atol=1e-4)


def test_gamma_one_is_dpo_and_gamma_zero_knows_no_reference():
    arrays = pairs(2)
    u, v = (total(arrays, f"policy_{s}") - total(arrays, f"reference_{s}") for s in ("chosen", "rejected"))
    np.testing.assert_allclose(gamma_dpo_loss(**float32(arrays)).loss, np.logaddexp(0, -0.1 * (u - v)), rtol=1e-5)
    moved = {name: value - 3.0 * name.startswith("reference") for name, value in arrays.items()}
    free = gamma_dpo_loss(**float32(arrays), gamma=0.0).loss
    np.testing.assert_array_equal(gamma_dpo_loss(**float32(moved), gamma=0.0).loss, free)
    assert np.any(np.abs(gamma_dpo_loss(**float32(moved), gamma=0.5).loss - free) > 1e-2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_a_pair_is_ranked_rightly_exactly_when_its_loss_is_below_the_threshold(beta, gamma):
    arrays = float32(pairs(3))
    output = gamma_dpo_loss(**arrays, beta=beta, gamma=gamma)
    np.testing.assert_array_equal(output.metrics["ranked"] == 1, output.loss <= output.metrics["threshold"])
    assert 0 < output.metrics["ranked"].mean() < 1
    if gamma == 1.0:
        metrics = ranking_metrics(**arrays, beta=beta).metrics
        np.testing.assert_array_equal(metrics["ranked"] == 1, metrics["excess_loss"] <= 0)


def test_metrics_against_numpy():
    arrays, beta = pairs(4), 0.3
    output = ranking_metrics(**float32(arrays), beta=beta)
    c = c_of(arrays)
    right = total(arrays, "policy_chosen") >= total(arrays, "policy_rejected")
    u, v = (total(arrays, f"policy_{s}") - total(arrays, f"reference_{s}") for s in ("chosen", "rejected"))
    expected = dict(
        ranked=right,
        ranked_per_token=mean(arrays, "policy_chosen") >= mean(arrays, "policy_rejected"),
        reference_ranked=c <= 0,
        reference_ranked_per_token=mean(arrays, "reference_chosen") >= mean(arrays, "reference_rejected"),
        reward_ranked=u > v,
        kept_right=(c <= 0) & right,
        kept_wrong=(c > 0) & ~right,
        flipped_right=(c > 0) & right,
        flipped_wrong=(c <= 0) & ~right,
        difficulty=beta * np.maximum(c, 0),
        threshold=np.logaddexp(0, -beta * c),
        excess_loss=np.logaddexp(0, -beta * (u - v)) - np.logaddexp(0, -beta * c),
    )
    assert output.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert output.metrics[name].dtype == np.float32
        np.testing.assert_allclose(output.metrics[name], value.astype(float), rtol=1e-4, atol=1e-5, err_msg=name)
    groups = sum(output.metrics[n] for n in ("kept_right", "kept_wrong", "flipped_right", "flipped_wrong"))
    np.testing.assert_array_equal(groups, 1.0)
    np.testing.assert_allclose(
        reference_log_ratio_per_token(**reference_only(arrays)),
        mean(arrays, "reference_rejected") - mean(arrays, "reference_chosen"),
        rtol=1e-4,
        atol=1e-6,
    )


def test_at_the_reference_the_loss_is_log_two_and_both_rank_alike():
    arrays = pairs()
    for side in ("chosen", "rejected"):
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"]
    output = ranking_metrics(**float32(arrays))
    np.testing.assert_allclose(output.loss, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(output.metrics["ranked"], output.metrics["reference_ranked"])
    assert not np.any(output.metrics["flipped_right"] + output.metrics["flipped_wrong"])
    assert not np.any(output.metrics["reward_ranked"])


def test_both_rankings_coincide_at_equal_lengths():
    arrays = pairs(5)
    arrays["rejected_mask"] = arrays["chosen_mask"]
    metrics = ranking_metrics(**float32(arrays)).metrics
    np.testing.assert_array_equal(metrics["ranked"], metrics["ranked_per_token"])
    np.testing.assert_array_equal(metrics["reference_ranked"], metrics["reference_ranked_per_token"])


def test_a_loss_of_at_most_log_two_ranks_rightly_where_the_reference_does():
    arrays = float32(pairs(6))
    output = ranking_metrics(**arrays)
    low = (output.loss <= np.log(2)) & (output.metrics["reference_ranked"] == 1)
    assert low.any() and np.all(output.metrics["ranked"][low] == 1)


def test_idealised_accuracy_against_the_formula():
    rng = np.random.default_rng(0)
    c, alpha = rng.normal(0, 20, 50), rng.choice([0.25, 0.5, 0.75, 1.0], 50)
    clipped = np.clip(alpha, 1e-3, 1 - 1e-3)
    values = []
    for beta in PAPER_BETAS:
        expected = -c + np.log(clipped / (1 - clipped)) / beta
        c32, alpha32 = jnp.asarray(c, jnp.float32), jnp.asarray(alpha, jnp.float32)
        np.testing.assert_allclose(ideal_log_ratio(c32, alpha32, beta=beta), expected, rtol=2e-4, atol=1e-4)
        values.append(np.mean(expected > 0))
        assert idealized_ranking_accuracy(c32, alpha32, beta=beta) == pytest.approx(values[-1], abs=1e-6)
    spread = idealized_ranking_range(c32, alpha32)
    assert tuple(map(float, spread)) == pytest.approx((min(values), np.median(values), max(values)), abs=1e-6)
    assert spread.low < spread.high


def test_idealised_accuracy_falls_with_beta_from_one_to_the_reference():
    c = jnp.asarray(np.random.default_rng(1).normal(0, 10, 200), jnp.float32)
    values = [float(idealized_ranking_accuracy(c, jnp.array(0.75), beta=b)) for b in (1e-4, 0.01, 0.1, 1.0, 1e6)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1.0 and values[-1] == pytest.approx(float((c < 0).mean()), abs=1e-6)
    # Undecided raters leave the reference as it is, whatever beta.
    for beta in (0.01, 1.0):
        assert idealized_ranking_accuracy(c, jnp.array(0.5), beta=beta) == pytest.approx(float((c < 0).mean()))
    assert idealized_ranking_accuracy(jnp.zeros(3), jnp.array(0.5), beta=1.0) == 0.0  # strict


def test_max_beta_is_where_the_ideal_ranking_turns():
    c, alpha = jnp.array([4.0, 10.0, 0.5]), jnp.array([0.75, 0.9, 0.6])
    bound = max_beta_for_ideal(c, alpha)
    np.testing.assert_allclose(bound, np.log(np.array([3.0, 9.0, 1.5])) / np.array(c), rtol=1e-5)
    for i in range(3):
        assert ideal_log_ratio(c[i], alpha[i], beta=0.99 * float(bound[i])) > 0
        assert ideal_log_ratio(c[i], alpha[i], beta=1.01 * float(bound[i])) < 0
    edge = max_beta_for_ideal(jnp.array([-1.0, -1.0, 0.0, 0.0, 2.0]), jnp.array([0.75, 0.25, 0.75, 0.25, 0.25]))
    np.testing.assert_array_equal(edge, [np.inf, np.inf, np.inf, 0.0, 0.0])


def test_difficulty_and_thresholds():
    c = jnp.array([-5.0, 0.0, 30.0, 1e4])
    np.testing.assert_allclose(difficulty(c, beta=0.1), [0.0, 0.0, 3.0, 1e3])
    np.testing.assert_allclose(flip_threshold(c, beta=0.1), np.logaddexp(0, -0.1 * np.array(c)), rtol=1e-6)
    assert flip_threshold(c, beta=0.1)[1] == pytest.approx(np.log(2))


def test_the_ipo_threshold_is_sufficient_and_says_where_none_is():
    tau, h = 0.25, np.linspace(-20, 20, 401)  # h: log-ratio margin of the policy over the reference
    for c in (-6.0, 0.0, 1.5, 5.0):
        threshold = float(ipo_flip_threshold(jnp.array(c), tau=tau))
        loss, right = (h - 1 / (2 * tau)) ** 2, h >= c - 1e-9
        assert np.all(right[loss <= threshold - 1e-6])
        if c > 1 / (2 * tau):
            assert threshold == -np.inf and not right[np.argmin(loss)]
        else:
            assert threshold == pytest.approx((1 / (2 * tau) - c) ** 2)
            assert not np.all(right[loss <= threshold + 4.0])  # no larger threshold would do


def test_a_list_counts_only_if_all_of_it_is_in_order():
    logps = jnp.array(
        [[-1.0, -2.0, -3.0], [-1.0, -3.0, -2.0], [-1.0, -3.0, -2.0], [-2.0, -2.0, -9.0], [-1.0, -3.0, 0.0]]
    )
    scores = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 1.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    mask = jnp.ones((5, 3, 1)).at[4, 2].set(0)  # the item that would be out of order is absent
    np.testing.assert_array_equal(
        ranked_lists(policy_logps=logps[..., None], mask=mask, scores=scores), [1.0, 0.0, 1.0, 1.0, 1.0]
    )


def test_nothing_behind_the_mask_is_read():
    arrays = pairs(7)
    spoiled = {
        name: np.where(arrays[f"{name.split('_')[1]}_mask"] == 0, np.nan, value) if name.endswith("logps") else value
        for name, value in arrays.items()
    }
    clean, dirty = (ranking_metrics(**float32(a)) for a in (arrays, spoiled))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    np.testing.assert_allclose(reference_log_ratio(**reference_only(spoiled)), c_of(arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flip_threshold(jnp.zeros(1), beta=0.0), "beta is 0"),
        (lambda: ipo_flip_threshold(jnp.zeros(1), tau=-1.0), "tau is -1"),
        (lambda: ideal_log_ratio(jnp.zeros(1), jnp.ones(1), beta=1.0, eps=0.5), "eps is 0.5"),
        (lambda: difficulty(jnp.zeros(1), beta=float("nan")), "beta is nan"),
        (lambda: ranking_metrics(**float32(pairs()), beta=-1.0), "beta is -1"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
