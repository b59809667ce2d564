"""LN-DPO against float64 NumPy written from the formula, its reductions, and statistics of sampled answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import float32, pairs, sigmoid, value_and_gradients

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.ln_dpo import generation_stats, ln_dpo_loss

B, T = 5, 6
SIDES = ("chosen", "rejected")


def means(a):
    """(u, v): mean log ratio per token of both sides, float64 [B]."""
    ratios = (a[f"policy_{side}_logps"] - a[f"reference_{side}_logps"] for side in SIDES)
    return [(r * a[f"{s}_mask"]).sum(-1) / a[f"{s}_mask"].sum(-1) for s, r in zip(SIDES, ratios)]


@pytest.mark.parametrize(("beta", "e"), [(5.0, 0.0), (0.7, 0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(seed, beta, e):
    arrays = pairs(seed)
    u, v = means(arrays)
    x = beta * (u - v)
    expected = (1 - e) * np.logaddexp(0, -x) + e * np.logaddexp(0, x)
    output, gradient = value_and_gradients(ln_dpo_loss, arrays, beta=beta, label_smoothing=e)
    np.testing.assert_allclose(output.loss, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(output.metrics["chosen_reward"], beta * u, rtol=1e-4, atol=1e-6)
    slope = beta * (e * sigmoid(x) - (1 - e) * sigmoid(-x))
    for side, sign in (("chosen", 1), ("rejected", -1)):
        mask = arrays[f"{side}_mask"]
        expected = sign * slope[:, None] * mask / mask.sum(-1, keepdims=True)
        np.testing.assert_allclose(gradient[f"policy_{side}_logps"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 4])
def test_equal_lengths_are_dpo_with_beta_over_the_length(length):
    arrays = pairs()
    for side in SIDES:
        arrays[f"{side}_mask"] = np.broadcast_to(np.arange(T) < length, (B, T)).astype(float)
    arrays = float32(arrays)
    expected = dpo_loss(**arrays, beta=2.0 / length).loss
    np.testing.assert_allclose(ln_dpo_loss(**arrays, beta=2.0).loss, expected, rtol=1e-5)


def test_a_token_said_twice_changes_nothing_but_doubles_the_margin_of_dpo():
    arrays = pairs(2)
    once, twice = float32(arrays), float32({n: np.repeat(a, 2, axis=-1) for n, a in arrays.items()})
    np.testing.assert_allclose(ln_dpo_loss(**twice).loss, ln_dpo_loss(**once).loss, rtol=1e-4, atol=1e-6)
    margins = [dpo_loss(**a).metrics["margin"] for a in (once, twice)]
    np.testing.assert_allclose(margins[1], 2 * margins[0], rtol=1e-4, atol=1e-6)


def test_tokens_at_the_mean_log_ratio_change_nothing():
    arrays = pairs(3)
    mask = (np.arange(T) < 3).astype(float)
    arrays["rejected_mask"] = np.broadcast_to(mask, (B, T)).copy()
    before = ln_dpo_loss(**float32(arrays)).loss
    _, v = means(arrays)
    arrays["policy_rejected_logps"][:, 3:] = arrays["reference_rejected_logps"][:, 3:] + v[:, None]
    arrays["rejected_mask"][:] = 1.0
    np.testing.assert_allclose(ln_dpo_loss(**float32(arrays)).loss, before, rtol=1e-5, atol=1e-6)


def test_no_reference_is_the_gap_of_mean_log_probabilities():
    arrays = pairs(4)
    zero = {f"reference_{s}_logps": 0 * arrays[f"reference_{s}_logps"] for s in SIDES}
    mean = [(arrays[f"policy_{s}_logps"] * arrays[f"{s}_mask"]).sum(-1) / arrays[f"{s}_mask"].sum(-1) for s in SIDES]
    expected = np.logaddexp(0, -2.5 * (mean[0] - mean[1]))
    np.testing.assert_allclose(ln_dpo_loss(**float32({**arrays, **zero}), beta=2.5).loss, expected, rtol=1e-5)


def test_rewards_do_not_grow_with_length():
    arrays = pairs(5)
    metrics = ln_dpo_loss(**float32(arrays), beta=1.0).metrics
    for side in SIDES:
        ratio = np.abs(arrays[f"policy_{side}_logps"] - arrays[f"reference_{side}_logps"]) * arrays[f"{side}_mask"]
        assert np.all(np.abs(metrics[f"{side}_reward"]) <= ratio.max(-1) + 1e-6)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_loss_is_log_two_when_policy_is_reference(beta):
    arrays = pairs()
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in SIDES}}
    np.testing.assert_allclose(ln_dpo_loss(**float32(same), beta=beta).loss, np.log(2), rtol=1e-6)


def test_an_empty_completion_has_a_reward_of_zero():
    arrays = pairs()
    arrays["chosen_mask"][:] = 0
    _, v = means({**arrays, "chosen_mask": np.ones((B, T))})
    np.testing.assert_allclose(ln_dpo_loss(**float32(arrays), beta=1.0).loss, np.logaddexp(0, v), rtol=1e-5)


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(label_smoothing=0.6)])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ln_dpo_loss(**float32(pairs()), **options)


# Statistics of sampled answers


def samples(seed=0, rows=7):
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < rng.integers(1, T + 1, (rows, 1))).astype(float)
    return dict(
        policy_logps=-rng.gamma(2.0, 0.5, (rows, T)),
        reference_logps=-rng.gamma(2.0, 0.8, (rows, T)),
        mask=mask,
        scores=rng.integers(0, 3, rows).astype(float),
        baseline_scores=rng.integers(0, 3, rows).astype(float),
    )


def numpy_stats(a):
    ratio = ((a["policy_logps"] - a["reference_logps"]) * a["mask"]).sum(-1)
    length = a["mask"].sum(-1)
    wins = np.where(a["scores"] == a["baseline_scores"], 0.5, a["scores"] > a["baseline_scores"])
    return dict(
        kl_sequence=ratio.mean(),
        kl_token=ratio.sum() / length.sum(),
        length_mean=length.mean(),
        length_std=length.std(),
        length_median=np.median(length),
        score_mean=a["scores"].mean(),
        win_rate=wins.mean(),
    )


@pytest.mark.parametrize("rows", [1, 6, 7])
def test_statistics_against_numpy_and_without_empty_rows(rows):
    arrays = samples(rows=rows)
    expected = numpy_stats(arrays)
    padded = {
        n: np.concatenate([a, np.full((2, *a.shape[1:]), 0.0 if n == "mask" else 9.0)]) for n, a in arrays.items()
    }
    for inputs in (arrays, padded):
        actual = jax.jit(generation_stats)(**float32(inputs))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert float(actual[name]) == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_statistics_of_no_answer_are_zero():
    stats = generation_stats(**float32({**samples(), "mask": np.zeros((7, T))}))
    assert {name: float(value) for name, value in stats.items()} == dict.fromkeys(stats, 0.0)


def test_mean_log_ratio_over_exact_samples_is_the_divergence():
    policy, reference = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.2, 0.6])
    drawn = np.array([0, 0, 1, 2])  # each answer as often as its probability says
    one = jnp.ones((4, 1))
    stats = generation_stats(
        policy_logps=jnp.log(policy[drawn])[:, None],
        reference_logps=jnp.log(reference[drawn])[:, None],
        mask=one,
        scores=one[:, 0],
        baseline_scores=one[:, 0],
    )
    assert float(stats["kl_sequence"]) == pytest.approx((policy * np.log(policy / reference)).sum(), rel=1e-5)
    assert float(stats["win_rate"]) == 0.5
