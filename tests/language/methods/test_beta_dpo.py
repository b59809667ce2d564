"""beta-DPO: moving gaps, an exact draw without replacement, and the dynamic beta, against float64 NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import float32

from dpo_jax.language.methods.beta_dpo import (
    BetaDpoState,
    beta_dpo_loss,
    beta_dpo_state,
    select_pairs,
    track_gaps,
)
from dpo_jax.language.methods.dpo import dpo_loss

B, T = 10, 4
SIDES = ("chosen", "rejected")
KEY = jax.random.key(7)
draw = jax.jit(select_pairs, static_argnames="filter_ratio")
compiled_loss = jax.jit(beta_dpo_loss, static_argnames=("beta", "alpha", "filter_ratio", "decay", "min_beta"))


def pairs(seed=0, rows=B):
    return numeric.pairs(seed, 0.7, rows=rows, tokens=T)


def state(mean, std):
    return BetaDpoState(jnp.float32(mean), jnp.float32(std))


def gaps(a):
    u, v = (((a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1) for s in SIDES)
    return u - v


def one_token(gap):
    """Pairs of one token whose log-ratio margins are the given ones."""
    gap = jnp.asarray(gap, jnp.float32)[:, None]
    one, zero = jnp.ones_like(gap), jnp.zeros_like(gap)
    return dict(
        policy_chosen_logps=gap - 5,
        policy_rejected_logps=zero - 5,
        reference_chosen_logps=zero - 5,
        reference_rejected_logps=zero - 5,
        chosen_mask=one,
        rejected_mask=one,
    )


# The moving statistics


def test_gaps_are_tracked_over_batches_with_the_unbiased_deviation():
    rng, moving, mean, std = np.random.default_rng(0), beta_dpo_state(), 0.0, 0.0
    for step in range(4):
        gap, there = rng.normal(step, 2.0, 6), np.array([1, 1, 0, 1, 1, 1.0])
        if step == 2:
            there = 0 * there  # no row at all: nothing moves
        else:
            mean = 0.9 * mean + 0.1 * gap[there > 0].mean()
            std = 0.9 * std + 0.1 * gap[there > 0].std(ddof=1)
        moving = track_gaps(jnp.asarray(gap), jnp.asarray(there), moving)
        assert float(moving.gap_mean) == pytest.approx(mean, rel=1e-5)
        assert float(moving.gap_std) == pytest.approx(std, rel=1e-5)


@pytest.mark.parametrize("gap", [[3.0], [3.0, 3.0, 3.0]])
def test_one_gap_and_equal_gaps_have_no_deviation(gap):
    moved = track_gaps(jnp.asarray(gap), jnp.ones(len(gap)), state(1.0, 2.0), decay=0.5)
    assert (float(moved.gap_mean), float(moved.gap_std)) == (2.0, 1.0)


# The draw


@pytest.mark.parametrize(
    ("rows", "ratio", "kept"),
    [(10, 0.2, 8), (9, 0.2, 7), (1, 0.2, 1), (0, 0.2, 0), (10, 0.9, 1), (5, 0.4, 3), (10, 0.0, 10)],
)
def test_number_of_kept_rows(rows, ratio, kept):
    there = np.zeros(12)
    there[np.random.default_rng(1).permutation(12)[:rows]] = 1
    keep = draw(jnp.arange(12.0), jnp.asarray(there), state(5.0, 3.0), KEY, filter_ratio=ratio)
    assert float(keep.sum()) == kept
    assert np.all(keep <= there)


def test_draw_is_the_one_without_replacement():
    gap, mean, std, k = np.array([-1.0, 0.5, 1.0, 3.0]), 0.4, 1.5, 2
    weight = np.exp(-0.5 * ((gap - mean) / std) ** 2)
    expected = {}
    for pair in itertools.combinations(range(4), k):
        expected[pair] = sum(
            weight[i] / weight.sum() * weight[j] / (weight.sum() - weight[i]) for i, j in itertools.permutations(pair)
        )
    draws = 20_000
    many = jax.jit(
        jax.vmap(lambda key: select_pairs(jnp.asarray(gap), jnp.ones(4), state(mean, std), key, filter_ratio=0.5))
    )
    kept = np.asarray(many(jax.random.split(jax.random.key(0), draws)))
    assert sum(expected.values()) == pytest.approx(1.0)
    for pair, probability in expected.items():
        share = kept[:, list(pair)].all(-1).mean()
        assert share == pytest.approx(probability, abs=5 * np.sqrt(probability / draws)), pair


def test_narrow_density_keeps_the_gaps_next_to_the_mean():
    gap = jnp.array([4.0, -3.0, 1.1, 0.8, 50.0, 1e4])
    keep = draw(gap, jnp.ones(6), state(1.0, 1e-3), KEY, filter_ratio=0.5)
    np.testing.assert_array_equal(keep, [1, 0, 1, 1, 0, 0])
    far = draw(jnp.full(6, 1e30), jnp.array([0, 1, 1, 1, 0, 1]), state(0.0, 0.0), KEY, filter_ratio=0.5)
    assert float(far.sum()) == 2 and float(far[0] + far[4]) == 0


def test_draw_follows_the_key_and_not_the_places_behind():
    gap = jnp.asarray(np.random.default_rng(0).normal(size=8))
    draws = [draw(gap, jnp.ones(8), state(0.0, 2.0), jax.random.key(k), filter_ratio=0.5) for k in range(8)]
    assert len({tuple(np.asarray(draw)) for draw in draws}) > 4
    padded = jnp.concatenate([gap, jnp.zeros(5)])
    there = jnp.arange(13) < 8
    again = draw(padded, there, state(0.0, 2.0), jax.random.key(0), filter_ratio=0.5)
    np.testing.assert_array_equal(again[:8], draws[0])


# The loss


@pytest.mark.parametrize("options", [{}, dict(beta=0.7, alpha=0.2, filter_ratio=0.45, decay=0.5)])
def test_value_gradient_and_state_against_the_formula(options):
    o = dict(beta=0.1, alpha=0.6, filter_ratio=0.2, decay=0.9, min_beta=1e-3) | options
    arrays = pairs()
    arrays["chosen_mask"][3] = arrays["rejected_mask"][3] = 0
    gap, there = gaps(arrays), np.arange(B) != 3
    inputs, before = float32(arrays), state(0.3, 1.2)
    policy = {name: inputs[name] for name in (f"policy_{side}_logps" for side in SIDES)}

    def total(policy):
        output = compiled_loss(**{**inputs, **policy}, loss_state=before, key=KEY, **options)
        return output.loss.sum(), output

    gradient, output = jax.jit(jax.grad(total, has_aux=True))(policy)
    mean = o["decay"] * 0.3 + (1 - o["decay"]) * gap[there].mean()
    std = o["decay"] * 1.2 + (1 - o["decay"]) * gap[there].std(ddof=1)
    np.testing.assert_allclose(output.state, (mean, std), rtol=1e-5)
    kept = np.asarray(output.metrics["kept"]) > 0
    assert kept.sum() == int(9 * (1 - o["filter_ratio"])) and not kept[3]
    beta = max(o["beta"] * (1 + o["alpha"] * (gap[kept].mean() - mean)), o["min_beta"])
    np.testing.assert_allclose(output.metrics["beta_used"], beta, rtol=1e-4)
    scale = kept * 9 / kept.sum()
    np.testing.assert_allclose(output.loss, scale * np.logaddexp(0, -beta * gap), rtol=1e-4)
    np.testing.assert_allclose(output.metrics["margin"], o["beta"] * gap, rtol=1e-4, atol=1e-5)
    slope = -scale * beta / (1 + np.exp(beta * gap))
    for side, sign in (("chosen", 1), ("rejected", -1)):
        expected = sign * slope[:, None] * arrays[f"{side}_mask"]
        np.testing.assert_allclose(gradient[f"policy_{side}_logps"], expected, rtol=2e-4, atol=1e-7)
        assert np.all(gradient[f"policy_{side}_logps"][~kept] == 0)


def test_mean_over_rows_is_the_mean_over_kept_ones():
    output = compiled_loss(**float32(pairs(2)), loss_state=state(0.0, 3.0), key=KEY, filter_ratio=0.35)
    kept = np.asarray(output.metrics["kept"]) > 0
    x = np.asarray(output.metrics["margin"]) / 0.1 * np.asarray(output.metrics["beta_used"])
    assert kept.sum() == 6
    np.testing.assert_allclose(output.loss.mean(), np.logaddexp(0, -x[kept]).mean(), rtol=1e-5)


def test_without_filter_and_adaptation_it_is_dpo():
    arrays = float32(pairs(3))
    output = compiled_loss(**arrays, loss_state=beta_dpo_state(), key=KEY, beta=0.3, alpha=0.0, filter_ratio=0.0)
    np.testing.assert_allclose(output.loss, dpo_loss(**arrays, beta=0.3).loss, rtol=1e-6)


def test_beta_is_the_given_one_at_the_mean_gap_and_never_below_its_bound():
    gap = np.array([1.0, 3.0, 2.0, 2.0])
    level = compiled_loss(**one_token(gap), loss_state=state(2.0, 1.0), key=KEY, filter_ratio=0.0)
    np.testing.assert_allclose(level.metrics["beta_used"], 0.1, rtol=1e-5)
    low = compiled_loss(**one_token(gap - 100), loss_state=state(2.0, 1.0), key=KEY, filter_ratio=0.0)
    np.testing.assert_allclose(low.metrics["beta_used"], 1e-3, rtol=1e-6)
    assert float(low.metrics["gap_mean"][0]) == pytest.approx(0.9 * 2 - 0.1 * 98, rel=1e-5)


def test_first_batch_is_centred_at_a_tenth_of_its_mean():
    gap = np.array([0.25, 9.75, 10.0, -10.0])  # mean 2.5, the others ten deviations away
    output = compiled_loss(**one_token(gap), loss_state=beta_dpo_state(), key=KEY, filter_ratio=0.75)
    np.testing.assert_allclose(output.metrics["gap_mean"], 0.25, rtol=1e-5)
    np.testing.assert_array_equal(output.metrics["kept"], [1, 0, 0, 0])
    np.testing.assert_allclose(output.metrics["beta_used"], 0.1, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_of_one_and_of_equal_gaps_is_learned(rows):
    output = compiled_loss(**one_token(np.full(rows, 2.0)), loss_state=beta_dpo_state(), key=KEY)
    assert np.all(np.isfinite(output.loss)) and float(output.loss.sum()) > 0


def test_a_batch_of_empty_places_costs_nothing_and_moves_nothing():
    arrays = one_token(np.ones(3))
    arrays |= {f"{side}_mask": jnp.zeros((3, 1)) for side in SIDES}
    output = compiled_loss(**arrays, loss_state=state(0.5, 2.0), key=KEY)
    np.testing.assert_array_equal(output.loss, 0.0)
    assert output.state == (0.5, 2.0)


@pytest.mark.parametrize(
    "options",
    [
        dict(beta=0.0),
        dict(filter_ratio=1.0),
        dict(filter_ratio=-0.1),
        dict(decay=1.5),
        dict(min_beta=0.0),
        dict(alpha=-1),
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        beta_dpo_loss(**float32(pairs()), loss_state=beta_dpo_state(), key=KEY, **options)
