"""Extrapolation of parameters and distributions, and the momentum that it builds up in exact iterations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.accelerated_po import cumulative_steps, extrapolate, extrapolate_log_probs


def log_softmax(x):
    return x - np.logaddexp.reduce(x, -1, keepdims=True)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"norm": rng.normal(0, 1, 3).astype(np.float32), "mlp": [rng.normal(0, 1, (2, 4)).astype(np.float32)]}


def as_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_extrapolated_parameters(alpha):
    new, previous = tree(0), tree(1)
    moved = extrapolate(as_jax(new), as_jax(previous), alpha=alpha)
    expected = jax.tree.map(lambda a, b: (1 + alpha) * a.astype(float) - alpha * b.astype(float), new, previous)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, expected)
    if alpha == 0:
        jax.tree.map(np.testing.assert_array_equal, moved, new)


def test_a_policy_that_did_not_move_stays_and_the_default_is_three_tenths():
    new = as_jax(tree(0))
    jax.tree.map(np.testing.assert_array_equal, extrapolate(new, new, alpha=0.7), new)
    assert float(extrapolate(jnp.array(2.0), jnp.array(1.0))) == pytest.approx(2.3)


def test_low_precision_is_extrapolated_in_float32_and_integers_are_kept():
    new = {"w": jnp.array([1.0, 300.0], jnp.bfloat16), "step": jnp.array([7, 7])}
    previous = {"w": jnp.array([1.0078125, 298.0], jnp.bfloat16), "step": jnp.array([1, 1])}
    moved = extrapolate(new, previous, alpha=0.5)
    assert moved["w"].dtype == jnp.bfloat16
    exact = 1.5 * np.asarray(new["w"], np.float32) - 0.5 * np.asarray(previous["w"], np.float32)
    np.testing.assert_array_equal(moved["w"], jnp.asarray(exact).astype(jnp.bfloat16))
    np.testing.assert_array_equal(moved["step"], [7, 7])


def test_trees_that_do_not_match():
    with pytest.raises(ValueError, match=r"\['w'\] is \(2,\) in the new tree and \(3,\)"):
        extrapolate({"w": jnp.zeros(2)}, {"w": jnp.zeros(3)})
    with pytest.raises(ValueError):
        extrapolate({"w": jnp.zeros(2)}, {"v": jnp.zeros(2)})


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_momentum_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha"):
        extrapolate(jnp.zeros(1), jnp.zeros(1), alpha=alpha)
    with pytest.raises(ValueError, match="alpha"):
        extrapolate_log_probs(jnp.zeros(2), jnp.zeros(2), alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("axis", [-1, 0])
def test_extrapolated_log_probs(alpha, axis):
    rng = np.random.default_rng(0)
    new, previous = rng.normal(0, 3, (2, 4, 6))
    if axis == 0:
        expected = log_softmax(((1 + alpha) * new - alpha * previous).T).T
    else:
        expected = log_softmax((1 + alpha) * new - alpha * previous)
    # Logits and their normalised form, moved by constants, give the same: the normaliser is made afterwards.
    for shift in (0.0, 5.0):
        found = extrapolate_log_probs(jnp.asarray(new + shift), jnp.asarray(previous - shift), alpha=alpha, axis=axis)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(found).sum(axis), 1.0, rtol=1e-5)


def test_extrapolation_of_no_change_and_of_extreme_logits():
    logits = jnp.array([[1e4, 0.0, -1e4]])
    same = extrapolate_log_probs(logits, logits, alpha=0.5)
    np.testing.assert_allclose(same, jax.nn.log_softmax(logits), rtol=1e-6)
    assert np.all(np.isfinite(extrapolate_log_probs(-logits, logits, alpha=0.9)))


def test_impossible_outcomes():
    new = jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0]))
    previous = jnp.log(jnp.array([0.25, 0.0, 0.75, 0.0]))
    found = np.exp(extrapolate_log_probs(new, previous, alpha=0.5))
    assert found[2] == 0 and found[3] == 0 and found.sum() == pytest.approx(1.0)
    assert found[0] / found[1] == pytest.approx(2.0**0.5, rel=1e-5)  # (0.5 / 0.25)^alpha


def test_parameters_and_logits_agree_where_logits_are_linear():
    rng = np.random.default_rng(1)
    x, new, previous = rng.normal(0, 1, (7, 3)), rng.normal(0, 1, (3, 5)), rng.normal(0, 1, (3, 5))
    by_parameters = jax.nn.log_softmax(jnp.asarray(x) @ extrapolate(jnp.asarray(new), jnp.asarray(previous), alpha=0.4))
    by_logits = extrapolate_log_probs(jnp.asarray(x @ new), jnp.asarray(x @ previous), alpha=0.4)
    np.testing.assert_allclose(by_parameters, by_logits, rtol=1e-4, atol=1e-5)


def test_cumulative_steps_in_closed_form():
    t = np.arange(9)
    for alpha in (0.0, 0.3, 0.5, 0.9):
        closed = t / (1 - alpha) - alpha * (1 - alpha**t) / (1 - alpha) ** 2
        np.testing.assert_allclose(cumulative_steps(8, alpha=alpha), closed, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(cumulative_steps(8, alpha=1.0), t * (t + 1) / 2)
    near_one = cumulative_steps(8, alpha=1 - 1e-12)
    np.testing.assert_allclose(near_one, t * (t + 1) / 2, rtol=1e-10)
    np.testing.assert_array_equal(cumulative_steps(0, alpha=0.5), [0.0])
    for rounds, alpha in ((-1, 0.5), (2, 1.1)):
        with pytest.raises(ValueError, match=r"rounds|alpha"):
            cumulative_steps(rounds, alpha=alpha)


def iterations(log_ref, reward, beta, alpha, rounds):
    """Exact proximal steps around the extrapolated policy: log pi after each round."""
    log_pi = hat = jnp.asarray(log_ref)
    out = [log_pi]
    for _ in range(rounds):
        new = jax.nn.log_softmax(hat + jnp.asarray(reward) / beta)
        hat, log_pi = extrapolate_log_probs(new, log_pi, alpha=alpha), new
        out.append(new)
    return np.asarray(jnp.stack(out), float)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5])
def test_exact_rounds_follow_the_cumulative_steps(alpha):
    rng = np.random.default_rng(2)
    log_ref, reward, beta = log_softmax(rng.normal(0, 1, (4, 6))), rng.uniform(0, 1, (4, 6)), 2.0
    for log_pi, s in zip(iterations(log_ref, reward, beta, alpha, 6), cumulative_steps(6, alpha=alpha)):
        np.testing.assert_allclose(log_pi, log_softmax(log_ref + s * reward / beta), rtol=1e-3, atol=1e-4)


def test_momentum_makes_the_rounds_go_further():
    rng = np.random.default_rng(3)
    log_ref, reward = log_softmax(rng.normal(0, 1, (40, 8))), rng.uniform(0, 3, (40, 8))
    missing = {}
    for alpha in (0.0, 0.3, 0.5):
        policies = np.exp(iterations(log_ref, reward, 1.0, alpha, 4))
        missing[alpha] = (reward.max(-1) - (policies * reward).sum(-1)).mean(-1)
        assert np.all(np.diff(missing[alpha]) < 0)
    np.testing.assert_allclose(missing[0.3][1], missing[0.0][1], rtol=1e-5)
    assert np.all(missing[0.3][2:] < missing[0.0][2:]) and np.all(missing[0.5][2:] < missing[0.3][2:])


def test_extrapolating_from_the_extrapolated_policy_builds_no_momentum():
    """With hat_t in the place of pi_t each step is 1 + alpha long: the mistake that the card warns of."""
    log_ref, reward, alpha = np.log([0.5, 0.5]), np.array([1.0, 0.0]), 0.5
    hat, gaps = jnp.asarray(log_ref), []
    for _ in range(5):
        new = jax.nn.log_softmax(hat + jnp.asarray(reward))
        gaps.append(float(new[0] - new[1]))
        hat = extrapolate_log_probs(new, hat, alpha=alpha)
    np.testing.assert_allclose(np.diff(gaps), 1 + alpha, rtol=1e-4)
    right = iterations(log_ref, reward, 1.0, alpha, 5)
    assert np.diff(right[:, 0] - right[:, 1])[-1] > 1.9  # towards 1 / (1 - alpha)
