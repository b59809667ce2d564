"""Reward-model losses against float64 NumPy written from the formulas, pooling and calibration."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import central_differences, softplus

from dpo_jax.language.methods.reward_model import (
    bradley_terry_loss,
    bradley_terry_margin_loss,
    bradley_terry_soft_loss,
    davidson_loss,
    expected_calibration_error,
    pool_last,
    rao_kupper_loss,
    reward_pairs_loss,
    reward_plackett_luce_loss,
    reward_prompt_pairs_loss,
)

B, K, T = 7, 4, 3
LOG2 = np.log(2.0)


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        policy_chosen_reward=rng.normal(0, 2, B),
        policy_rejected_reward=rng.normal(0, 2, B),
        margin=rng.normal(0, 1, B),
        label_prob=rng.uniform(0, 1, B),
        is_tie=(np.arange(B) % 3 == 0).astype(float),
    )


def lists(seed=0):
    """Lists with absent items, tied scores, one list without a pair and one empty place."""
    rng = np.random.default_rng([seed, 1])
    there = rng.random((B, K)) < 0.7
    there[0], there[1], there[-1] = True, np.arange(K) == 2, False
    return dict(
        policy_reward=rng.normal(0, 2, (B, K)),
        scores=rng.integers(0, 4, (B, K)).astype(float),
        mask=there[..., None] * (np.arange(T) < rng.integers(1, T + 1, (B, K, 1))).astype(float),
    )


def numpy_bradley_terry(a, label_smoothing, center_coef):
    r, s = a["policy_chosen_reward"], a["policy_rejected_reward"]
    e = label_smoothing
    return (1 - e) * softplus(s - r) + e * softplus(r - s) + center_coef * (r + s) ** 2


def numpy_margin(a):
    return softplus(-(a["policy_chosen_reward"] - a["policy_rejected_reward"] - a["margin"]))


def numpy_soft(a):
    d, q = a["policy_chosen_reward"] - a["policy_rejected_reward"], a["label_prob"]
    return q * softplus(-d) + (1 - q) * softplus(d)


def rao_kupper(d, nu):
    """Probabilities of win, lose and tie, in strengths exp(r)."""
    w, l = np.exp(d), 1.0
    win, lose = w / (w + nu * l), l / (l + nu * w)
    return win, lose, (nu**2 - 1) * w * l / ((w + nu * l) * (l + nu * w))


def davidson(d, nu):
    w, l = np.exp(d), 1.0
    total = w + l + nu * np.sqrt(w * l)
    return w / total, l / total, nu * np.sqrt(w * l) / total


def numpy_ties(model):
    def loss(a, nu):
        win, _, tie = model(a["policy_chosen_reward"] - a["policy_rejected_reward"], nu)
        return -np.log(np.where(a["is_tie"], tie, win))

    return loss


def list_pairs(a):
    """(nll summed over the pairs, number of pairs) of each list, by loops."""
    nll, count = np.zeros(len(a["scores"])), np.zeros(len(a["scores"]))
    there = a["mask"].any(-1)
    for row, (rewards, scores) in enumerate(zip(a["policy_reward"], a["scores"])):
        for i, j in itertools.permutations(np.flatnonzero(there[row]), 2):
            if scores[i] > scores[j]:
                nll[row] += softplus(rewards[j] - rewards[i])
                count[row] += 1
    return nll, count


def numpy_pairs(a):
    nll, count = list_pairs(a)
    return nll / count.sum() * a["mask"].any((-1, -2)).sum()  # the mean over rows that are there is the pairs' mean


def numpy_prompt_pairs(a):
    nll, count = list_pairs(a)
    return nll / np.maximum(count, 1)


def numpy_plackett_luce(a):
    out = np.zeros(len(a["scores"]))
    for row, there in enumerate(a["mask"].any(-1)):
        order = [i for i in np.argsort(-a["scores"][row], kind="stable") if there[i]]
        ordered = a["policy_reward"][row][order]
        out[row] = sum(np.logaddexp.reduce(ordered[k:]) - ordered[k] for k in range(len(ordered)))
    return out


PAIR_ARRAYS = ("policy_chosen_reward", "policy_rejected_reward")
MEMBERS = [
    (bradley_terry_loss, numpy_bradley_terry, PAIR_ARRAYS, dict(label_smoothing=0.0, center_coef=0.0)),
    (bradley_terry_loss, numpy_bradley_terry, PAIR_ARRAYS, dict(label_smoothing=0.2, center_coef=0.3)),
    (bradley_terry_margin_loss, numpy_margin, (*PAIR_ARRAYS, "margin"), {}),
    (bradley_terry_soft_loss, numpy_soft, (*PAIR_ARRAYS, "label_prob"), {}),
    (rao_kupper_loss, numpy_ties(rao_kupper), (*PAIR_ARRAYS, "is_tie"), dict(nu=2.0)),
    (rao_kupper_loss, numpy_ties(rao_kupper), (*PAIR_ARRAYS, "is_tie"), dict(nu=1.1)),
    (davidson_loss, numpy_ties(davidson), (*PAIR_ARRAYS, "is_tie"), dict(nu=1.0)),
    (davidson_loss, numpy_ties(davidson), (*PAIR_ARRAYS, "is_tie"), dict(nu=0.3)),
    (reward_pairs_loss, numpy_pairs, ("policy_reward", "mask", "scores"), {}),
    (reward_prompt_pairs_loss, numpy_prompt_pairs, ("policy_reward", "mask", "scores"), {}),
    (reward_plackett_luce_loss, numpy_plackett_luce, ("policy_reward", "mask", "scores"), {}),
]
IDS = [f"{loss.__name__}-{'-'.join(map(str, options.values()))}" for loss, _, _, options in MEMBERS]


@functools.cache
def compiled(loss, options):
    def total(policy, rest):
        output = loss(**policy, **rest, **dict(options))
        return output.loss.sum(), output

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(loss, arrays, names, **options):
    """Output and gradient of the summed loss by the policy's arrays."""
    inputs = {name: np.asarray(arrays[name], np.float32) for name in names}
    policy = {name: inputs.pop(name) for name in names if name.startswith("policy")}
    gradient, output = jax.device_get(compiled(loss, tuple(options.items()))(policy, inputs))
    return output, gradient


@pytest.mark.parametrize(("loss", "formula", "names", "options"), MEMBERS, ids=IDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(loss, formula, names, options, seed):
    arrays = lists(seed) if "mask" in names else pairs(seed)
    output, gradient = evaluate(loss, arrays, names, **options)
    np.testing.assert_allclose(output.loss, formula(arrays, **options), rtol=1e-5, atol=1e-6)
    for name, value in gradient.items():
        numeric = central_differences(lambda a: formula(a, **options), arrays, name)
        np.testing.assert_allclose(value, numeric, rtol=1e-4, atol=1e-6, err_msg=name)


def two(d, **columns) -> dict[str, Any]:
    """One pair with rewards d and 0 for each d."""
    d = jnp.atleast_1d(jnp.asarray(d, jnp.float32))
    return dict(policy_chosen_reward=d, policy_rejected_reward=0 * d, **{n: v + 0 * d for n, v in columns.items()})


def test_equal_rewards_give_log_two_and_no_accuracy():
    output, _ = evaluate(bradley_terry_loss, two(0.0), PAIR_ARRAYS)
    assert output.loss[0] == pytest.approx(LOG2, rel=1e-6)
    assert output.metrics["accuracy"][0] == 0


def test_an_offset_matters_to_centring_only():
    arrays = pairs()
    moved = {**arrays, **{name: arrays[name] + 5.0 for name in PAIR_ARRAYS}}
    for options, same in ((dict(), True), (dict(center_coef=0.01), False)):
        a, b = (evaluate(bradley_terry_loss, x, PAIR_ARRAYS, **options)[0].loss for x in (arrays, moved))
        assert np.allclose(a, b, rtol=1e-4, atol=1e-5) == same


def test_swapping_the_pair_flips_the_margin():
    arrays = pairs()
    swapped = dict(zip(PAIR_ARRAYS, (arrays["policy_rejected_reward"], arrays["policy_chosen_reward"])))
    a, b = (evaluate(bradley_terry_loss, x, PAIR_ARRAYS)[0] for x in (arrays, swapped))
    np.testing.assert_allclose(a.metrics["margin"], -b.metrics["margin"], rtol=1e-6)
    np.testing.assert_allclose(a.loss - b.loss, -a.metrics["margin"], rtol=1e-5, atol=1e-6)


def test_optima():
    """Smoothing 1/2 rests at 0 with log 2; share q at logit q; margin m is log 2 at d = m and not in the accuracy."""
    output, gradient = evaluate(bradley_terry_loss, two(0.0), PAIR_ARRAYS, label_smoothing=0.5)
    assert output.loss[0] == pytest.approx(LOG2, rel=1e-6)
    assert gradient["policy_chosen_reward"][0] == pytest.approx(0.0, abs=1e-7)
    q = 0.8
    names = (*PAIR_ARRAYS, "label_prob")
    _, gradient = evaluate(bradley_terry_soft_loss, two(np.log(q / (1 - q)), label_prob=q), names)
    assert gradient["policy_chosen_reward"][0] == pytest.approx(0.0, abs=1e-6)
    output, _ = evaluate(bradley_terry_margin_loss, two(0.7, margin=0.7), (*PAIR_ARRAYS, "margin"))
    assert output.loss[0] == pytest.approx(LOG2, rel=1e-6)
    assert output.metrics["accuracy"][0] == 1 and output.metrics["margin"][0] == pytest.approx(0.7)


@pytest.mark.parametrize("loss", [reward_pairs_loss, reward_prompt_pairs_loss, reward_plackett_luce_loss])
def test_lists_of_two_are_bradley_terry(loss):
    arrays = pairs()
    rewards = np.stack([arrays[name] for name in PAIR_ARRAYS], -1)
    best_first = dict(policy_reward=rewards, scores=np.tile([1.0, 0.0], (B, 1)), mask=np.ones((B, 2, 1)))
    output, _ = evaluate(loss, best_first, ("policy_reward", "mask", "scores"))
    expected = evaluate(bradley_terry_loss, arrays, PAIR_ARRAYS)[0]
    np.testing.assert_allclose(output.loss, expected.loss, rtol=1e-5)
    np.testing.assert_array_equal(output.metrics["accuracy"], expected.metrics["accuracy"])


def test_pairs_or_prompts_first():
    """Every pair of the batch counts once; averaged per prompt, the pair of a short list counts more."""
    arrays = lists()
    nll, count = list_pairs(arrays)
    there = arrays["mask"].any((-1, -2))
    by_pairs = evaluate(reward_pairs_loss, arrays, ("policy_reward", "mask", "scores"))[0]
    assert by_pairs.loss[there].mean() == pytest.approx(nll.sum() / count.sum(), rel=1e-5)
    np.testing.assert_array_equal(by_pairs.metrics["pairs"], count)
    by_prompts = evaluate(reward_prompt_pairs_loss, arrays, ("policy_reward", "mask", "scores"))[0]
    assert abs(by_prompts.loss[there].mean() - by_pairs.loss[there].mean()) > 0.01


def test_absent_items_have_no_say():
    arrays = lists()
    absent = ~arrays["mask"].any(-1)
    spoiled = {**arrays, "policy_reward": np.where(absent, np.nan, arrays["policy_reward"])}
    spoiled["scores"] = np.where(absent, 99.0, arrays["scores"])
    for loss in (reward_pairs_loss, reward_prompt_pairs_loss, reward_plackett_luce_loss):
        (output, gradient), (other, same) = (
            evaluate(loss, a, ("policy_reward", "mask", "scores")) for a in (arrays, spoiled)
        )
        np.testing.assert_array_equal(other.loss, output.loss)
        np.testing.assert_array_equal(same["policy_reward"], gradient["policy_reward"])
        assert not np.any(gradient["policy_reward"][absent])


@pytest.mark.parametrize(("loss", "model", "nu"), [(rao_kupper_loss, rao_kupper, 1.7), (davidson_loss, davidson, 0.6)])
def test_win_lose_and_tie_exhaust_the_outcomes(loss, model, nu):
    d = np.array([-3.0, -0.4, 0.0, 2.0])
    names = (*PAIR_ARRAYS, "is_tie")
    win = np.exp(-evaluate(loss, two(d, is_tie=0.0), names, nu=nu)[0].loss)
    lose = np.exp(-evaluate(loss, two(-d, is_tie=0.0), names, nu=nu)[0].loss)
    tie = np.exp(-evaluate(loss, two(d, is_tie=1.0), names, nu=nu)[0].loss)
    np.testing.assert_allclose(win + lose + tie, 1.0, rtol=1e-5)
    np.testing.assert_allclose(tie[2], (nu - 1) / (nu + 1) if model is rao_kupper else nu / (nu + 2), rtol=1e-5)


@pytest.mark.parametrize(("loss", "nu"), [(rao_kupper_loss, 1 + 1e-7), (davidson_loss, 1e-7)])
def test_without_ties_they_are_bradley_terry(loss, nu):
    arrays = {**pairs(), "is_tie": np.zeros(B)}
    output, gradient = evaluate(loss, arrays, (*PAIR_ARRAYS, "is_tie"), nu=nu)
    expected, expected_gradient = evaluate(bradley_terry_loss, arrays, PAIR_ARRAYS)
    np.testing.assert_allclose(output.loss, expected.loss, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient["policy_chosen_reward"], expected_gradient["policy_chosen_reward"], rtol=1e-4)


@pytest.mark.parametrize(("loss", "names", "options"), [(m[0], m[2], m[3]) for m in MEMBERS if "mask" not in m[2]])
def test_rewards_of_ten_thousand(loss, names, options):
    columns = dict(margin=0.5, label_prob=0.3, is_tie=0.0)
    arrays = two([1e4, -1e4], **columns)
    for tie in (0.0, 1.0):
        output, gradient = evaluate(loss, {**arrays, "is_tie": np.full(2, tie)}, names, **options)
        assert np.isfinite(output.loss).all() and all(np.isfinite(g).all() for g in gradient.values())


def test_a_linear_model_recovers_the_reward():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, 20)
    x, y = rng.normal(0, 1, (2, 2000, 20))
    better = rng.random(2000) < 1 / (1 + np.exp(-(x - y) @ truth))
    chosen, rejected = (jnp.asarray(np.where(better[:, None], a, b), jnp.float32) for a, b in ((x, y), (y, x)))

    def loss(weights, center_coef=0.0):
        bias = weights[-1]
        output = bradley_terry_loss(
            policy_chosen_reward=chosen @ weights[:-1] + bias,
            policy_rejected_reward=rejected @ weights[:-1] + bias,
            center_coef=center_coef,
        )
        return output.loss.mean()

    for center_coef in (0.0, 0.01):
        step = jax.grad(lambda w, c=center_coef: loss(w, c))
        weights = jax.lax.fori_loop(0, 300, lambda _, w, step=step: w - step(w), jnp.zeros(21).at[-1].set(3.0))
        found = np.asarray(weights[:-1])
        assert found @ truth / np.linalg.norm(found) / np.linalg.norm(truth) > 0.95
        mean_reward = float(jnp.mean((chosen + rejected) @ weights[:-1]) / 2 + weights[-1])
        assert (abs(mean_reward) < 0.05) == (center_coef > 0)


@pytest.mark.parametrize("call", [
    lambda: bradley_terry_loss(**two(0.0), center_coef=-0.1),
    lambda: bradley_terry_loss(**two(0.0), label_smoothing=0.6),
    lambda: rao_kupper_loss(**two(0.0, is_tie=0.0), nu=1.0),
    lambda: davidson_loss(**two(0.0, is_tie=0.0), nu=0.0),
    lambda: expected_calibration_error(jnp.ones(1), jnp.ones(1), bins=0),
])  # fmt: skip
def test_options_out_of_range(call):
    with pytest.raises(ValueError, match="give"):
        call()


# Pooling


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [0, 3])
def test_pooling_does_not_depend_on_padding(side, padding):
    states = np.random.default_rng(0).normal(0, 1, (2, 5, 3))
    hidden, mask = np.full((2, 5 + padding, 3), 7.0), np.zeros((2, 5 + padding))
    start = padding if side == "left" else 0
    hidden[:, start : start + 5], mask[:, start : start + 5] = states, 1
    np.testing.assert_allclose(pool_last(jnp.asarray(hidden, jnp.float32), jnp.asarray(mask)), states[:, -1], rtol=1e-6)


def test_pooling_takes_the_last_kept_token_and_zero_of_nothing():
    hidden = jnp.arange(12, dtype=jnp.bfloat16).reshape(2, 3, 2)
    pooled = pool_last(hidden, jnp.array([[1, 1, 0], [0, 0, 0]]))
    np.testing.assert_array_equal(np.asarray(pooled, np.float32), [[2, 3], [0, 0]])
    assert pooled.dtype == jnp.bfloat16
    gradient = jax.grad(lambda h: pool_last(h, jnp.array([[1, 1, 0]])).sum())(jnp.ones((1, 3, 2)))
    np.testing.assert_array_equal(gradient[0], [[0, 0], [1, 1], [0, 0]])


# Calibration


def numpy_ece(confidence, correct, bins):
    total = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 5, 16])
def test_calibration_error_against_loops(bins):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0, 1, 200).astype(np.float32)
    correct = (rng.random(200) < 0.5).astype(np.float32)
    error = expected_calibration_error(jnp.asarray(confidence), jnp.asarray(correct), bins=bins)
    assert error == pytest.approx(numpy_ece(confidence.astype(float), correct, bins), rel=1e-4)


def test_calibration_error_of_the_best_and_the_worst():
    quarters = jnp.array([0.25] * 4 + [1.0] * 2)
    assert expected_calibration_error(quarters, jnp.array([1, 0, 0, 0, 1, 1])) == pytest.approx(0.0, abs=1e-6)
    assert expected_calibration_error(jnp.ones(5), jnp.zeros(5)) == pytest.approx(1.0)
    assert expected_calibration_error(jnp.zeros(0), jnp.zeros(0)) == 0
