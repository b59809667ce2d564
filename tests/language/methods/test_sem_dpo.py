"""Sem-DPO against float64 NumPy written from the formula, and the drift that its weights take away."""

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import float32, value_and_gradients

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.sem_dpo import sem_dpo_loss, semantic_distance, semantic_weights

B, T, D = 6, 5, 8
SIDES = ("chosen", "rejected")


def pairs(seed=0):
    distance = np.random.default_rng([seed, 1]).uniform(0, 2, B)
    return numeric.pairs(seed, rows=B, tokens=T) | {"semantic_distance": distance}


def embeddings(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, B, D))


# Distances and weights


def test_distance_against_the_formula_at_any_scale():
    a, b = embeddings()
    expected = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    for scale in (1e-20, 1.0, 1e20):
        actual = semantic_distance(jnp.asarray(a * scale, jnp.float32), jnp.asarray(3 * b, jnp.float32))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_distance_of_parallel_opposite_and_zero_vectors():
    a = jnp.asarray(embeddings()[0], jnp.float32)
    np.testing.assert_allclose(semantic_distance(a, 7 * a), 0.0, atol=1e-6)
    np.testing.assert_allclose(semantic_distance(a, -a), 2.0, atol=1e-6)
    np.testing.assert_array_equal(semantic_distance(a, 0 * a), 1.0)
    half = semantic_distance(a.astype(jnp.bfloat16), a.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32 and np.all((half >= 0) & (half < 1e-6))


@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
def test_weights_against_the_formula_and_in_their_bounds(alpha):
    d = np.linspace(0, 2, 21)
    weights = semantic_weights(jnp.asarray(d, jnp.float32), alpha=alpha)
    np.testing.assert_allclose(weights, np.exp(-alpha * d), rtol=1e-6)
    assert np.all(weights <= 1) and np.all(weights >= np.exp(-2 * alpha) * (1 - 1e-6))


def test_weighted_distance_falls_with_alpha_and_tails_are_bounded():
    d = np.random.default_rng(1).uniform(0, 2, 400)
    means = []
    for alpha in (0.0, 0.5, 1.0, 3.0, 10.0):
        weights = np.asarray(semantic_weights(jnp.asarray(d), alpha=alpha), np.float64)
        means.append((weights * d).sum() / weights.sum())
        for r in (0.3, 1.0, 1.7):
            assert weights[d >= r].sum() / weights.sum() <= np.exp(-alpha * r) / weights.mean() * (1 + 1e-6)
    assert means[0] == pytest.approx(d.mean(), rel=1e-6)
    assert np.all(np.diff(means) < 0)


# The loss


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 1.0), (0.8, 4.0)])
def test_value_and_gradient_are_the_weight_times_those_of_dpo(beta, alpha):
    arrays = pairs(1)
    ratio = [(arrays[f"policy_{s}_logps"] - arrays[f"reference_{s}_logps"]) * arrays[f"{s}_mask"] for s in SIDES]
    x = beta * (ratio[0].sum(-1) - ratio[1].sum(-1))
    weight = np.exp(-alpha * arrays["semantic_distance"])
    output, gradient = value_and_gradients(sem_dpo_loss, arrays, beta=beta, alpha=alpha)
    np.testing.assert_allclose(output.loss, weight * np.logaddexp(0, -x), rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(output.metrics["pair_weight"], weight, rtol=1e-5)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        expected = -sign * beta * weight / (1 + np.exp(x))
        np.testing.assert_allclose(
            gradient[f"policy_{side}_logps"], expected[:, None] * arrays[f"{side}_mask"], rtol=1e-4, atol=1e-7
        )


def test_no_alpha_and_no_distance_are_dpo():
    arrays = float32(pairs(2))
    plain = dpo_loss(**{name: value for name, value in arrays.items() if name != "semantic_distance"}).loss
    np.testing.assert_allclose(sem_dpo_loss(**arrays, alpha=0.0).loss, plain, rtol=1e-6)
    arrays["semantic_distance"] = jnp.zeros(B)
    np.testing.assert_allclose(sem_dpo_loss(**arrays, alpha=5.0).loss, plain, rtol=1e-6)


def test_loss_is_the_weight_times_log_two_when_policy_is_reference():
    arrays = pairs()
    same = {**arrays, **{f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in SIDES}}
    expected = np.exp(-arrays["semantic_distance"]) * np.log(2)
    np.testing.assert_allclose(sem_dpo_loss(**float32(same)).loss, expected, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(alpha=-1.0), dict(alpha=float("inf"))])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sem_dpo_loss(**float32(pairs()), **options)


def test_a_rewriter_drifts_less_for_little_of_its_score():
    # Rewrites that drift score higher; a log-linear policy learns from noisy preferences for the score.
    rng = np.random.default_rng(0)
    prompts, rewrites = 500, 8
    drift = rng.uniform(0, 1.2, (prompts, rewrites))
    score = rng.normal(size=drift.shape) + 1.5 * drift
    features = jnp.asarray(np.stack([score, drift, drift**2], -1), jnp.float32)
    first, second = np.array([rng.choice(rewrites, 2, replace=False) for _ in range(prompts)]).T
    rows = np.arange(prompts)
    wins = rng.random(prompts) < 1 / (1 + np.exp(-2 * (score[rows, first] - score[rows, second])))
    chosen, rejected = np.where(wins, first, second), np.where(wins, second, first)
    one = jnp.ones((prompts, 1))

    @jax.jit
    def train(alpha_distance):
        def loss(theta):
            logps = jax.nn.log_softmax(features @ theta)
            uniform = jnp.full((prompts, 1), -jnp.log(rewrites))
            return sem_dpo_loss(
                policy_chosen_logps=logps[rows, chosen][:, None],
                policy_rejected_logps=logps[rows, rejected][:, None],
                reference_chosen_logps=uniform,
                reference_rejected_logps=uniform,
                chosen_mask=one,
                rejected_mask=one,
                semantic_distance=alpha_distance,
                beta=0.1,
                alpha=1.0,
            ).loss.mean()

        return jax.lax.fori_loop(0, 400, lambda _, theta: theta - 20 * jax.grad(loss)(theta), jnp.zeros(3))

    drifts, scores = [], []
    for alpha in (0.0, 1.0, 3.0, 10.0):
        policy = jax.nn.softmax(features @ train(jnp.asarray(alpha * drift[rows, chosen], jnp.float32)))
        drifts.append(float((policy * drift).sum(-1).mean()))
        scores.append(float((policy * score).sum(-1).mean()))
    assert np.all(np.diff(drifts) < -0.03), drifts
    assert scores[1] > 0.98 * scores[0] and scores[2] > 0.92 * scores[0], scores
