"""Masked reductions, stable links and the sums of a completion, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.ops import (
    batch_mean,
    completion_sums,
    cosine_similarity,
    kl_divergence,
    lambda_weights,
    log1mexp,
    log_odds,
    logistic_loss,
    masked_count,
    masked_mean,
    masked_sum,
    ordered_pairs,
    pair_metrics,
    plackett_luce_nll,
    present,
    ranks,
    require_between,
    require_positive,
    safe_divide,
    smoothed_logistic_loss,
    strict_pairs,
    token_mean_nll,
)

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(4, 7)).astype(np.float32)
MASK = (np.arange(7) < np.array([7, 4, 1, 0])[:, None]) & (np.arange(7) != 2)
RUBBISH = np.where(MASK, VALUES, np.resize([np.nan, np.inf, -np.inf, 1e30], VALUES.shape)).astype(np.float32)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masked_reductions_see_only_the_mask(dtype):
    mask = jnp.asarray(MASK.astype(dtype))
    total = (VALUES.astype(np.float64) * MASK).sum(-1)
    count = MASK.sum(-1)
    np.testing.assert_allclose(masked_sum(jnp.asarray(RUBBISH), mask), total, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(masked_mean(jnp.asarray(RUBBISH), mask), total / np.maximum(count, 1), atol=1e-6)
    np.testing.assert_array_equal(masked_count(mask), count)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean])
def test_gradient_is_clean_behind_the_mask_and_absent_for_the_mask(reduce):
    weights = jnp.array([1.0, -2.0, 3.0, 5.0])

    def total(values, mask):
        return jnp.sum(weights * reduce(values, mask))

    by_values, by_mask = jax.grad(total, argnums=(0, 1))(jnp.asarray(RUBBISH), jnp.asarray(MASK, jnp.float32))
    scale = 1 if reduce is masked_sum else np.maximum(MASK.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(by_values, np.asarray(weights)[:, None] * MASK / scale, rtol=1e-6)
    assert not np.any(by_mask)


def test_masked_mean_with_weights_below_one():
    values, weights = jnp.array([2.0, 4.0, 9.0]), jnp.array([0.1, 0.3, 0.0])
    assert masked_mean(values, weights) == pytest.approx(3.5, rel=1e-6)


def test_masked_sum_takes_another_axis():
    np.testing.assert_allclose(masked_sum(VALUES, MASK, axis=0), (VALUES * MASK).sum(0), rtol=1e-6, atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    # 256 + 1 is not a bfloat16 number: a sum in bfloat16 stops growing there.
    assert masked_sum(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000)) == 1000


def test_safe_divide_by_zero_is_zero_with_zero_gradient():
    numerator, denominator = jnp.array([3.0, 3.0, np.inf]), jnp.array([2.0, 0.0, 0.0])
    np.testing.assert_array_equal(safe_divide(numerator, denominator), [1.5, 0.0, 0.0])
    by_numerator, by_denominator = jax.grad(lambda n, d: safe_divide(n, d).sum(), argnums=(0, 1))(
        numerator, denominator
    )
    np.testing.assert_array_equal(by_numerator, [0.5, 0.0, 0.0])
    np.testing.assert_array_equal(by_denominator, [-0.75, 0.0, 0.0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.5])
def test_logistic_losses_and_their_slopes_at_any_size(smoothing):
    x = np.array([-1e4, -90.0, -3.0, 0.0, 0.4, 90.0, 1e4])
    positive, negative = np.logaddexp(0, -x), np.logaddexp(0, x)
    expected = (1 - smoothing) * positive + smoothing * negative
    np.testing.assert_allclose(smoothed_logistic_loss(jnp.asarray(x), smoothing), expected, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(logistic_loss(jnp.asarray(x)), positive, rtol=1e-6, atol=1e-30)
    slope = jax.vmap(jax.grad(lambda z: smoothed_logistic_loss(z, smoothing)))(jnp.asarray(x, jnp.float32))
    sigmoid = np.exp(-np.logaddexp(0, -x))
    np.testing.assert_allclose(slope, sigmoid - (1 - smoothing), atol=1e-6)


def test_completion_sums_of_lists_and_without_reference():
    policy = -RNG.gamma(2.0, size=(2, 3, 5)).astype(np.float32)
    reference = -RNG.gamma(2.0, size=(2, 3, 5)).astype(np.float32)
    mask = np.arange(5) < RNG.integers(0, 6, (2, 3, 1))
    sums = completion_sums(jnp.asarray(policy), jnp.asarray(reference), jnp.asarray(mask))
    np.testing.assert_allclose(sums.logps, (policy * mask).sum(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sums.log_ratio, ((policy - reference) * mask).sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sums.length, mask.sum(-1))
    free = completion_sums(jnp.asarray(policy), None, jnp.asarray(mask))
    np.testing.assert_array_equal(free.log_ratio, sums.logps)


def test_mean_log_probability_of_an_empty_completion_is_zero():
    sums = completion_sums(jnp.array([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]]), None, jnp.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(sums.mean_logps, [-1.5, 0.0])


def test_log_ratio_keeps_a_margin_that_two_long_sums_would_lose():
    # 4096 tokens of -8 nats: sums near -32768, where float32 steps are 0.002; each token's ratio is 2^-20.
    policy = jnp.full((1, 4096), -8.0 + 2.0**-20)
    sums = completion_sums(policy, jnp.full((1, 4096), -8.0), jnp.ones((1, 4096)))
    assert sums.log_ratio[0] == pytest.approx(2.0**-8, rel=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        completion_sums(jnp.zeros((4, 3)), jnp.zeros((1, 3)), jnp.zeros((4, 3)))
    with pytest.raises(AssertionError):
        completion_sums(jnp.zeros((4, 3)), None, jnp.zeros((1, 3)))
    one = completion_sums(jnp.zeros((1, 3)), None, jnp.ones((1, 3)))
    four = completion_sums(jnp.zeros((4, 3)), None, jnp.ones((4, 3)))
    with pytest.raises(AssertionError):
        pair_metrics(four, one, four.log_ratio, one.log_ratio)


def test_accuracy_counts_strictly_larger_rewards():
    sums = completion_sums(jnp.zeros((3, 1)), None, jnp.ones((3, 1)))
    metrics = pair_metrics(sums, sums, jnp.array([1.0, 0.0, -1.0]), jnp.array([0.0, 0.0, 0.0]))
    np.testing.assert_array_equal(metrics["accuracy"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(metrics["margin"], [1.0, 0.0, -1.0])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_require_positive_names_the_argument(value):
    with pytest.raises(ValueError, match="gamma is"):
        require_positive(beta=1.0, gamma=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_require_between_names_the_argument(value):
    require_between(0.0, 1.0, alpha=0.0)
    require_between(0.0, float("inf"), alpha=1e9)
    with pytest.raises(ValueError, match="alpha is"):
        require_between(0.0, 1.0 if value != float("inf") else value, alpha=value)


@pytest.mark.parametrize("x", [-1e4, -90.0, -5.0, -0.7, -0.6931, -0.5, -1e-3, -2e-6])
def test_log1mexp_and_log_odds_in_float64(x):
    expected = np.log(-np.expm1(np.float64(np.float32(x))))
    np.testing.assert_allclose(log1mexp(jnp.float32(x)), expected, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(log_odds(jnp.float32(x)), np.float64(np.float32(x)) - expected, rtol=2e-6, atol=1e-7)
    slope = np.exp(np.float64(np.float32(x)) - expected) * -1
    np.testing.assert_allclose(jax.grad(log1mexp)(jnp.float32(x)), slope, rtol=2e-6, atol=1e-30)


def test_log1mexp_is_finite_where_the_probability_rounds_to_one():
    for x in (0.0, -1e-9):
        assert np.isfinite(log1mexp(jnp.float32(x))) and np.isfinite(jax.grad(log1mexp)(jnp.float32(x)))


def test_statistics_of_a_batch_leave_empty_places_out():
    chosen, rejected = jnp.array([[1, 1], [0, 0], [0, 0]]), jnp.array([[0, 0], [0, 1], [0, 0]])
    there = present(chosen, rejected)
    np.testing.assert_array_equal(there, [1, 1, 0])
    np.testing.assert_array_equal(present(jnp.stack([chosen, rejected], 1)), [1, 1, 0])  # [B, K, T]
    assert batch_mean(jnp.array([1.0, 3.0, np.nan]), there) == 2.0
    assert batch_mean(jnp.array([np.nan]), jnp.zeros(1)) == 0.0


def test_token_mean_nll_averages_to_the_mean_over_all_tokens():
    nll = token_mean_nll(jnp.asarray(RUBBISH), jnp.asarray(MASK))
    there = present(jnp.asarray(MASK))
    np.testing.assert_allclose(batch_mean(nll, there), -VALUES[MASK].astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_array_equal(token_mean_nll(jnp.asarray(RUBBISH), jnp.zeros(MASK.shape)), np.zeros(4))


def test_cosine_similarity_at_any_scale():
    a, b = RNG.normal(size=(2, 5, 3)).astype(np.float32)
    expected = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    for scale in (1e-20, 1.0, 1e25):
        np.testing.assert_allclose(cosine_similarity(jnp.asarray(a * scale), jnp.asarray(b)), expected, rtol=1e-5)
    zero = jnp.zeros((2, 3))
    assert not np.any(cosine_similarity(zero, jnp.ones((2, 3))))
    assert np.isfinite(jax.grad(lambda v: jnp.sum(cosine_similarity(v, jnp.ones((2, 3)))))(zero)).all()


def test_token_weights_weigh_log_ratios_and_nothing_else():
    reference, weights = RNG.normal(size=(2, *VALUES.shape)).astype(np.float32)
    rubbish = np.where(MASK, weights, np.nan)
    sums = completion_sums(jnp.asarray(RUBBISH), jnp.asarray(reference), jnp.asarray(MASK), jnp.asarray(rubbish))
    plain = completion_sums(jnp.asarray(RUBBISH), jnp.asarray(reference), jnp.asarray(MASK))
    np.testing.assert_allclose(sums.log_ratio, np.where(MASK, weights * (VALUES - reference), 0).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(sums.logps, plain.logps)
    np.testing.assert_array_equal(sums.length, plain.length)

    def total(policy, weights):
        return jnp.sum(completion_sums(policy, jnp.asarray(reference), jnp.asarray(MASK), weights).log_ratio)

    by_policy, by_weights = jax.grad(total, argnums=(0, 1))(jnp.asarray(RUBBISH), jnp.asarray(rubbish))
    np.testing.assert_allclose(by_policy, np.where(MASK, weights, 0), rtol=1e-6)
    assert not np.any(by_weights)


SCORES = np.array([[0.3, -1.2, 2.0, 0.7], [1.0, 5.0, -3.0, 0.0]], np.float32)
LABELS = np.array([[0.1, 0.9, 0.4, 0.4], [0.8, 0.2, 0.5, 0.0]], np.float32)
THERE = np.array([[1, 1, 1, 1], [1, 0, 1, 1]], np.float32)


def test_pairs_and_ranks_of_lists():
    pairs = strict_pairs(jnp.asarray(LABELS), jnp.asarray(THERE))
    for row in range(2):
        for i in range(4):
            for j in range(4):
                assert pairs[row, i, j] == (LABELS[row, i] > LABELS[row, j] and THERE[row, i] * THERE[row, j])
    np.testing.assert_array_equal(ranks(jnp.asarray(SCORES), jnp.asarray(THERE)), [[3, 4, 1, 2], [1, 4, 3, 2]])
    np.testing.assert_array_equal(ranks(jnp.zeros(3), jnp.ones(3)), [1, 2, 3])


def test_ordered_pairs_in_float64():
    scores = np.where(THERE > 0, SCORES, np.nan)  # an absent item's score is not read

    def nll(scores):
        return ordered_pairs(scores, jnp.asarray(LABELS), jnp.asarray(THERE)).nll.sum()

    found = ordered_pairs(jnp.asarray(scores), jnp.asarray(LABELS), jnp.asarray(THERE))
    slope = np.zeros_like(scores, np.float64)
    for row in range(2):
        above = [
            (i, j) for i in range(4) for j in range(4) if LABELS[row, i] > LABELS[row, j] and all(THERE[row, [i, j]])
        ]
        gaps = np.array([np.float64(scores[row, i]) - np.float64(scores[row, j]) for i, j in above])
        np.testing.assert_allclose(found.nll[row], np.logaddexp(0, -gaps).sum(), rtol=1e-5)
        np.testing.assert_allclose(found.gap[row], gaps.sum(), rtol=1e-5, atol=1e-6)
        metrics = [float(found.metrics[name][row]) for name in ("margin", "accuracy", "pairs")]
        np.testing.assert_allclose(metrics, [gaps.mean(), (gaps > 0).mean(), len(above)], rtol=1e-5, atol=1e-6)
        for (i, j), gap in zip(above, gaps):
            slope[row, i] -= 1 / (1 + np.exp(gap))
            slope[row, j] += 1 / (1 + np.exp(gap))
    np.testing.assert_allclose(jax.grad(nll)(jnp.asarray(scores)), slope, rtol=1e-5, atol=1e-6)


def test_kl_divergence_in_float64_and_with_impossible_words():
    p, q = np.random.default_rng(0).normal(0, 2, (2, 3, 5))
    p[1, 2] = p[2, 0] = q[2, 0] = -np.inf
    share = np.exp(p) / np.exp(p).sum(-1, keepdims=True)
    other = np.exp(q) / np.exp(q).sum(-1, keepdims=True)
    expected = [sum(a * np.log(a / b) for a, b in zip(*rows) if a) for rows in zip(share, other)]
    p, q = jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)
    np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=1e-5)
    slope = jax.grad(lambda q: kl_divergence(p, q).sum())(q)  # q - p
    np.testing.assert_allclose(slope, other - share, atol=1e-6)
    assert kl_divergence(q, p)[1] == np.inf
    np.testing.assert_allclose(kl_divergence(p, p + 3.0), 0.0, atol=1e-6)


def test_lambda_weights_in_float64():
    weights = lambda_weights(jnp.asarray(LABELS), jnp.asarray(SCORES), jnp.asarray(THERE))
    tau = np.array([[3, 4, 1, 2], [1, 4, 3, 2]], np.float64)
    for row in range(2):
        for i in range(4):
            for j in range(4):
                gain = abs(2 ** np.float64(LABELS[row, i]) - 2 ** np.float64(LABELS[row, j]))
                discount = abs(1 / np.log(1 + tau[row, i]) - 1 / np.log(1 + tau[row, j]))
                expected = gain * discount * THERE[row, i] * THERE[row, j]
                np.testing.assert_allclose(weights[row, i, j], expected, rtol=1e-5, atol=1e-7)


def test_plackett_luce_in_float64():
    there, scores = jnp.asarray(THERE), jnp.asarray(np.where(THERE > 0, SCORES, np.nan))
    orders = [[1, 2, 3, 0], [0, 2, 3]]  # by label, ties in list order
    expected = []
    for row, order in enumerate(orders):
        s = SCORES[row, order].astype(np.float64)
        expected.append(sum(np.log(np.exp(s[k:]).sum()) - s[k] for k in range(len(s))))
    np.testing.assert_allclose(plackett_luce_nll(scores, jnp.asarray(LABELS), there), expected, rtol=1e-5)
    gradient = jax.grad(lambda s: jnp.sum(plackett_luce_nll(s, jnp.asarray(LABELS), there)))(scores)
    step = 1e-3 * np.eye(4)
    for k in range(4):

        def value(s):
            s = s[orders[0]].astype(np.float64)
            return sum(np.log(np.exp(s[i:]).sum()) - s[i] for i in range(4))

        slope = (value(SCORES[0] + step[k]) - value(SCORES[0] - step[k])) / 2e-3
        np.testing.assert_allclose(gradient[0, k], slope, rtol=1e-4, atol=1e-5)
    assert gradient[1, 1] == 0
    far = plackett_luce_nll(jnp.array([1e4, -1e4, 0.0]), jnp.array([0.0, 1.0, 2.0]), jnp.ones(3))
    np.testing.assert_allclose(far, 1e4 + 2e4, rtol=1e-5)
