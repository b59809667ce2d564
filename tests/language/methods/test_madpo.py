"""MADPO against float64 NumPy written from the formula, the shape of its weights and the margin that it aims at."""

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import float32, value_and_gradients

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.madpo import gumbel_preference, madpo_loss, madpo_weights

B, T = 6, 5
SIDES = ("chosen", "rejected")
TAU = np.log(0.999 / 0.001)
SETTINGS = [
    dict(c_max=2.0, c_min=0.5, steepness=1.0, tau=TAU),
    dict(c_max=4.0, c_min=0.25, steepness=1.0, tau=TAU),
    dict(c_max=3.0, c_min=0.1, steepness=5.0, tau=1.5),
]


def numpy_weights(h, c_max, c_min, steepness, tau):
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * np.exp(steepness * (np.abs(h) - tau)))
    with np.errstate(over="ignore"):
        w = (1 + np.exp(-h)) / (1 + np.exp(-c * h))
    return np.where(h > -tau, w, 1.0), c


def pairs(seed=0):
    rng = np.random.default_rng([seed, 1])
    return numeric.pairs(seed, rows=B, tokens=T) | {f"{side}_score": rng.normal(0, 4, B) for side in SIDES}


def without_scores(arrays):
    return {name: value for name, value in arrays.items() if not name.endswith("score")}


# Weights


@pytest.mark.parametrize("options", SETTINGS)
def test_weights_against_the_formula(options):
    h = np.linspace(-20, 20, 161) + 0.01  # no margin within float32 of -tau, where w jumps
    actual = madpo_weights(jnp.asarray(h, jnp.float32), **options)
    weight, coef = numpy_weights(h, **options)
    np.testing.assert_allclose(actual.coef, coef, rtol=1e-5)
    np.testing.assert_allclose(actual.weight, weight, rtol=2e-5)


def test_default_weights_are_the_official_ones():
    h = np.array([-8.0, -3.0, 0.5, 4.0, 9.0])
    np.testing.assert_allclose(madpo_weights(jnp.asarray(h)).weight, numpy_weights(h, **SETTINGS[0])[0], rtol=1e-5)


@pytest.mark.parametrize("options", SETTINGS)
def test_shape_of_the_weights(options):
    tau = options["tau"]
    at = madpo_weights(jnp.array([0.0, tau, -tau, -1.5 * tau]), **options)
    np.testing.assert_allclose(at.weight, 1.0, rtol=1e-5)
    np.testing.assert_allclose(at.coef[1:3], 1.0, rtol=1e-5)
    inside = jnp.asarray(np.linspace(0.02, 0.98, 30) * tau, jnp.float32)
    assert np.all(madpo_weights(inside, **options).weight > 1)
    assert np.all(madpo_weights(inside, **options).weight <= 2)
    assert np.all(madpo_weights(-inside, **options).weight < 1)
    beyond = madpo_weights(jnp.asarray(np.linspace(1.05, 2.0, 10) * tau, jnp.float32), **options)
    assert np.all(beyond.weight < 1) and np.all(beyond.coef < 1) and np.all(beyond.coef > options["c_min"])
    falling = madpo_weights(jnp.linspace(0.0, 2 * tau, 50), **options).coef
    assert np.all(np.diff(falling) < 0)


def test_weights_of_extreme_margins():
    actual = madpo_weights(jnp.array([1e4, -1e4, 3e38, -3e38]))
    np.testing.assert_allclose(actual.weight, 1.0)
    np.testing.assert_allclose(actual.coef, 0.5)


@pytest.mark.parametrize("options", [dict(c_max=1.0), dict(c_min=1.0), dict(c_max=1.0, c_min=1.0)])
def test_no_amplification_is_dpo_and_so_is_its_neighbourhood(options):
    h = jnp.linspace(-9, 9, 19)
    np.testing.assert_array_equal(madpo_weights(h, **options).weight, 1.0)
    near = madpo_weights(h, c_max=1 + 1e-4, c_min=1 - 1e-4)
    np.testing.assert_allclose(near.weight, 1.0, atol=1e-3)
    arrays = float32(pairs())
    np.testing.assert_allclose(madpo_loss(**arrays, **options).loss, dpo_loss(**without_scores(arrays)).loss, rtol=1e-6)


# The loss


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_value_and_gradient_are_the_weight_times_those_of_dpo(options, beta):
    arrays = pairs(1)
    ratio = [(arrays[f"policy_{s}_logps"] - arrays[f"reference_{s}_logps"]) * arrays[f"{s}_mask"] for s in SIDES]
    x = beta * (ratio[0].sum(-1) - ratio[1].sum(-1))
    h = arrays["chosen_score"] - arrays["rejected_score"]
    weight, coef = numpy_weights(h, **options)
    output, gradient = value_and_gradients(madpo_loss, arrays, beta=beta, **options)
    np.testing.assert_allclose(output.loss, weight * np.logaddexp(0, -x), rtol=2e-5)
    for name, value in (("pair_weight", weight), ("coef", coef), ("score_margin", h)):
        np.testing.assert_allclose(output.metrics[name], value, rtol=2e-5, atol=1e-6)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        expected = -sign * beta * weight / (1 + np.exp(x))
        np.testing.assert_allclose(
            gradient[f"policy_{side}_logps"], expected[:, None] * arrays[f"{side}_mask"], rtol=1e-4, atol=1e-6
        )


def test_loss_is_the_weight_times_log_two_when_policy_is_reference():
    arrays = pairs()
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in SIDES}}
    output = madpo_loss(**float32(same))
    np.testing.assert_allclose(output.loss, output.metrics["pair_weight"] * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("options", SETTINGS)
def test_optimum_under_bradley_terry_labels_is_the_amplified_margin(options):
    # Pairs seen in both orders as often as their margin says: stationary at h + log w(h) - log w(-h).
    h, beta = np.array([0.1, 1.0, 3.0, 8.0]), 0.1
    p = 1 / (1 + np.exp(-h))
    (up, c), (down, _) = numpy_weights(h, **options), numpy_weights(-h, **options)
    aim = h + np.log(up) - np.log(down)
    below_tau = h < options["tau"]
    np.testing.assert_allclose(aim[below_tau], (c * h)[below_tau], rtol=1e-6)
    assert np.all(aim[~below_tau] < h[~below_tau])
    both = lambda x, y: jnp.concatenate([jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)])  # noqa: E731

    @jax.jit
    @jax.grad
    def slope(margin):
        zero = 0 * margin
        losses = madpo_loss(
            policy_chosen_logps=both(margin, zero)[:, None] / beta,
            policy_rejected_logps=both(zero, margin)[:, None] / beta,
            reference_chosen_logps=jnp.zeros((8, 1)),
            reference_rejected_logps=jnp.zeros((8, 1)),
            chosen_mask=jnp.ones((8, 1)),
            rejected_mask=jnp.ones((8, 1)),
            chosen_score=both(h, 0 * h),
            rejected_score=both(0 * h, h),
            beta=beta,
            **options,
        ).loss
        return jnp.sum(both(p, 1 - p) * losses)

    below, at, above = (slope(jnp.asarray(aim + d, jnp.float32)) for d in (-0.1, 0.0, 0.1))
    assert np.all(below < 0) and np.all(above > 0)
    assert np.all(np.abs(at) < 2e-3 * (above - below))


@pytest.mark.parametrize(
    "options", [dict(beta=0.0), dict(c_max=0.9), dict(c_min=0.0), dict(c_min=1.1), dict(tau=-1.0), dict(steepness=0.0)]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        madpo_loss(**float32(pairs()), **options)


# Labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_labels_follow_bradley_terry(scale):
    n = 20_000
    for gap in (-1.0, 0.0, 2.0):
        wins = gumbel_preference(jnp.full(n, 1.0 + gap), jnp.ones(n), jax.random.key(3), scale=scale)
        assert wins.dtype == bool
        assert float(wins.mean()) == pytest.approx(1 / (1 + np.exp(-gap / scale)), abs=5 * 0.5 / np.sqrt(n))


def test_labels_are_a_function_of_the_key_and_sure_at_large_gaps():
    scores = jnp.linspace(-1, 1, 64)
    first, again, other = (gumbel_preference(scores, -scores, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert np.all(gumbel_preference(scores + 100, scores, jax.random.key(0)))
    with pytest.raises(ValueError, match="scale"):
        gumbel_preference(scores, scores, jax.random.key(0), scale=0.0)
