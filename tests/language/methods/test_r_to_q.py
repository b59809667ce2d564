"""The token-level reading of a policy: identities on ragged logits and on small trees with a known optimum."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.r_to_q import (
    credit_auc,
    expected_implicit_reward,
    proxy_logits,
    q_values,
    soft_value_iteration,
    token_rewards,
)

B, T, V = 4, 6, 5


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def taken(values, tokens):
    return np.take_along_axis(values, tokens[..., None], -1)[..., 0]


def case(seed=0, spread=1.0):
    """Float64 logits, tokens, and masks that start late, have holes and one empty row."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 1.5, (B, T, V))
    mask = np.arange(T) >= rng.integers(0, 3, (B, 1))
    mask[0] = [True, True, False, True, True, False]
    mask[-1] = False
    return dict(
        policy_logits=reference + rng.normal(0, spread, (B, T, V)),
        reference_logits=reference,
        labels=rng.integers(0, V, (B, T)),
        mask=mask,
    )


def float32(arrays):
    dtypes = dict(f=jnp.float32, i=jnp.int32, b=bool)
    return {name: jnp.asarray(value, dtypes[value.dtype.kind]) for name, value in arrays.items()}


# Sequences


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_values_against_float64(beta):
    c = case()
    mask, labels = c["mask"], c["labels"]
    log_pi, log_ref = (taken(log_softmax(c[f"{who}_logits"]), labels) for who in ("policy", "reference"))
    q = beta * taken(c["policy_logits"], labels)
    v = beta * np.logaddexp.reduce(c["policy_logits"], -1)
    reward = np.zeros((B, T))
    for row, t in zip(*np.nonzero(mask), strict=True):
        later = np.nonzero(mask[row, t + 1 :])[0]
        reward[row, t] = q[row, t] - beta * log_ref[row, t] - (v[row, t + 1 + later[0]] if later.size else 0.0)
    values = q_values(**float32(c), beta=beta)
    for name, expected in dict(q=q, v=v, advantage=beta * (log_pi - log_ref), reward=reward).items():
        np.testing.assert_allclose(getattr(values, name), expected * mask, rtol=1e-4, atol=1e-5, err_msg=name)
    rewards = token_rewards(
        policy_logps=jnp.asarray(log_pi, jnp.float32),
        reference_logps=jnp.asarray(log_ref, jnp.float32),
        mask=jnp.asarray(mask),
        beta=beta,
    )
    np.testing.assert_allclose(rewards, values.advantage, rtol=1e-4, atol=1e-5)


def test_rewards_telescope_and_shaping_holds():
    c = case(1)
    mask = c["mask"]
    q, v, advantage, reward = (np.asarray(x, np.float64) for x in q_values(**float32(c), beta=0.5))
    first = np.where(mask.any(-1), v[np.arange(B), mask.argmax(-1)], 0.0)
    np.testing.assert_allclose(reward.sum(-1), first + advantage.sum(-1), rtol=1e-5, atol=1e-5)
    for row in range(B):
        places = np.nonzero(mask[row])[0]
        following = np.append(v[row, places[1:]], 0.0)[: places.size]
        shaped = reward[row, places] + following - v[row, places]
        np.testing.assert_allclose(shaped, advantage[row, places], rtol=1e-4, atol=1e-5)
    assert np.all(q[~mask] == 0)


def test_constants_of_the_logits_move_q_v_and_r_but_not_a():
    c = case(2)
    mask = c["mask"]
    shift = np.random.default_rng(3).normal(0, 4, (B, T, 1))
    here = q_values(**float32(c), beta=0.5)
    there = q_values(**float32({**c, "policy_logits": c["policy_logits"] + shift}), beta=0.5)
    np.testing.assert_allclose(there.advantage, here.advantage, atol=1e-5)
    np.testing.assert_allclose(there.q - here.q, 0.5 * shift[..., 0] * mask, atol=1e-5)
    assert np.abs(there.reward - here.reward).max() > 0.1

    def invariant(values):
        first = np.where(mask.any(-1), np.asarray(values.v)[np.arange(B), mask.argmax(-1)], 0.0)
        return np.asarray(values.reward).sum(-1) - first

    np.testing.assert_allclose(invariant(there), invariant(here), atol=1e-4)


def test_policy_equal_to_reference_has_no_advantage():
    c = case(4, spread=0.0)
    np.testing.assert_array_equal(q_values(**float32(c), beta=2.0).advantage, 0.0)


def test_what_stands_behind_the_mask_is_not_read():
    c = case(5)
    spoiled = {name: value.copy() for name, value in c.items()}
    spoiled["policy_logits"][~c["mask"]] = np.nan
    spoiled["reference_logits"][~c["mask"]] = np.inf
    spoiled["labels"][~c["mask"]] = -100
    for a, b in zip(q_values(**float32(c), beta=0.5), q_values(**float32(spoiled), beta=0.5), strict=True):
        np.testing.assert_array_equal(a, b)
    del c["labels"], spoiled["labels"]
    here, there = (expected_implicit_reward(**float32(arrays), beta=0.5) for arrays in (c, spoiled))
    np.testing.assert_array_equal(here, there)


def test_expected_reward_under_the_reference_and_under_the_policy():
    c, beta = case(6), 0.7
    log_pi, log_ref = log_softmax(c["policy_logits"]), log_softmax(c["reference_logits"])
    arrays = float32({name: value for name, value in c.items() if name != "labels"})
    expected = expected_implicit_reward(**arrays, beta=beta)
    by_hand = beta * (np.exp(log_ref) * (log_pi - log_ref)).sum(-1) * c["mask"]
    np.testing.assert_allclose(expected, by_hand, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(expected)[c["mask"]] < 0)
    # The mean of A over every word says the same, and under the policy itself it is beta KL(pi || pi_ref) >= 0.
    every = np.stack(
        [q_values(**float32({**c, "labels": np.full((B, T), word)}), beta=beta).advantage for word in range(V)],
        axis=-1,
    )
    np.testing.assert_allclose((np.exp(log_ref) * every).sum(-1), expected, rtol=1e-4, atol=1e-5)
    assert np.all((np.exp(log_pi) * every).sum(-1)[c["mask"]] > 0)
    same = expected_implicit_reward(**{**arrays, "policy_logits": arrays["reference_logits"]}, beta=beta)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_expected_reward_with_words_that_are_ruled_out():
    policy, reference = jnp.array([[[0.3, -0.2, -jnp.inf]]]), jnp.array([[[1.0, 0.0, -jnp.inf]]])
    narrow = dict(policy_logits=policy[..., :2], reference_logits=reference[..., :2])
    wide = dict(policy_logits=policy, reference_logits=reference)
    here, there = (expected_implicit_reward(**x, mask=jnp.ones((1, 1)), beta=1.0) for x in (narrow, wide))
    np.testing.assert_allclose(there, here, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_out_of_range_is_refused(beta):
    c = float32(case())
    logps = jnp.zeros((1, 1))
    calls = [
        lambda: q_values(**c, beta=beta),
        lambda: token_rewards(policy_logps=logps, reference_logps=logps, mask=logps, beta=beta),
        lambda: expected_implicit_reward(
            policy_logits=c["policy_logits"], reference_logits=c["reference_logits"], mask=c["mask"], beta=beta
        ),
        lambda: soft_value_iteration(rewards=[np.zeros(2)], reference_probs=[np.full(2, 0.5)], beta=beta),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"beta is {beta}"):
            call()


# Trees


def tree(seed, depth=3, words=3):
    rng = np.random.default_rng(seed)
    shapes = [(words,) * (t + 1) for t in range(depth)]
    probs = [np.exp(log_softmax(rng.normal(size=shape))) for shape in shapes]
    return [rng.normal(size=shape) for shape in shapes], probs


def along(tables, path):
    """The entries of per-depth tables that a path of tokens meets."""
    return np.array([table[path[: t + 1]] for t, table in enumerate(tables)])


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_backward_induction_is_the_bandit_solution_on_whole_answers(beta):
    rewards, probs = tree(0)
    optimum = soft_value_iteration(rewards=rewards, reference_probs=probs, beta=beta)
    paths = list(itertools.product(range(3), repeat=3))
    weight = np.array([along(probs, p).prod() * np.exp(along(rewards, p).sum() / beta) for p in paths])
    policy = np.array([along(optimum.policy, p).prod() for p in paths])
    np.testing.assert_allclose(policy, weight / weight.sum(), rtol=1e-9)
    assert float(optimum.v[0]) == pytest.approx(beta * np.log(weight.sum()), rel=1e-9)
    for table in optimum.policy:
        np.testing.assert_allclose(table.sum(-1), 1.0, rtol=1e-12)


def test_the_reward_can_be_read_back_from_the_optimal_policy():
    rewards, probs = tree(1)
    beta = 0.5
    optimum = soft_value_iteration(rewards=rewards, reference_probs=probs, beta=beta)
    paths = list(itertools.product(range(3), repeat=3))
    logits = np.array([[optimum.q[t][p[:t]] / beta for t in range(3)] for p in paths])
    reference = np.log([[probs[t][p[:t]] for t in range(3)] for p in paths])
    values = q_values(
        policy_logits=jnp.asarray(logits, jnp.float32),
        reference_logits=jnp.asarray(reference, jnp.float32),
        labels=jnp.asarray(paths),
        mask=jnp.ones((len(paths), 3)),
        beta=beta,
    )
    expected = np.array([along(rewards, p) for p in paths])
    np.testing.assert_allclose(values.reward, expected, rtol=1e-4, atol=1e-5)
    # Preferences between whole answers are the same under r and under A: V of the prompt cancels.
    r, a = (np.asarray(x, np.float64).sum(-1) for x in (values.reward, values.advantage))
    np.testing.assert_allclose(r[:, None] - r[None], a[:, None] - a[None], atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_likelihood_search_is_search_on_reward_and_value(depth):
    rewards, probs = tree(2)
    beta = 0.4
    optimum = soft_value_iteration(rewards=rewards, reference_probs=probs, beta=beta)
    for path in itertools.product(range(3), repeat=depth):
        gained = along(rewards[:depth], path).sum() + beta * np.log(along(probs[:depth], path)).sum()
        value = float(optimum.v[depth][path]) if depth < 3 else 0.0
        likelihood = beta * np.log(along(optimum.policy[:depth], path)).sum()
        assert gained + value == pytest.approx(float(optimum.v[0]) + likelihood, abs=1e-9)


def test_actions_that_are_ruled_out_and_answers_that_end_early():
    # The second word ends the answer; after it only that word goes on, with reward 0.
    rewards = [np.array([1.0, 2.0]), np.array([[3.0, -1.0], [9.0, 0.0]])]
    probs = [np.array([0.5, 0.5]), np.array([[0.5, 0.5], [0.0, 1.0]])]
    optimum = soft_value_iteration(rewards=rewards, reference_probs=probs, beta=1.0)
    weight = np.array([0.25 * np.exp(4.0), 0.25 * np.exp(0.0), 0.5 * np.exp(2.0)])
    policy = [optimum.policy[0][0] * optimum.policy[1][0, 0], optimum.policy[0][0] * optimum.policy[1][0, 1]]
    np.testing.assert_allclose([*policy, optimum.policy[0][1]], weight / weight.sum(), rtol=1e-9)
    np.testing.assert_array_equal(optimum.policy[1][1], [0.0, 1.0])


def test_trees_of_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="2 depths and reference_probs 1"):
        soft_value_iteration(rewards=[np.zeros(2), np.zeros((2, 2))], reference_probs=[np.full(2, 0.5)], beta=1.0)
    with pytest.raises(ValueError, match="depth 1 has shapes"):
        soft_value_iteration(rewards=[np.zeros(2)] * 2, reference_probs=[np.full(2, 0.5)] * 2, beta=1.0)


# Credit


def test_credit_compares_tokens_of_one_answer_only():
    rewards = np.array([[-1.0, 0.0, 0.5, np.nan], [5.0, 5.0, 6.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    errors = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]])
    # 2 of 2 pairs, then a tie, a win and a defeat: (2 + 0.5 + 1) / 5; the last answer has no error.
    assert credit_auc(token_rewards=rewards, is_error=errors, mask=mask) == pytest.approx(3.5 / 5)


def test_credit_of_noise_is_chance_and_of_the_right_signal_one():
    rng = np.random.default_rng(0)
    errors, mask = np.arange(20) == rng.integers(0, 20, (400, 1)), np.ones((400, 20))
    noise = credit_auc(token_rewards=rng.normal(size=(400, 20)), is_error=errors, mask=mask)
    assert noise == pytest.approx(0.5, abs=0.05)  # standard error 0.015
    signal = -1.0 * errors + rng.uniform(0, 0.5, (400, 20))
    assert credit_auc(token_rewards=signal, is_error=errors, mask=mask) == 1.0
    assert credit_auc(token_rewards=-signal, is_error=errors, mask=mask) == 0.0


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_credit_without_a_pair_is_refused(error):
    with pytest.raises(ValueError, match="cannot be measured"):
        credit_auc(token_rewards=np.zeros((2, 3)), is_error=np.full((2, 3), error), mask=np.ones((2, 3)))


# Proxy


def test_proxy_against_float64_and_its_ends():
    base, tuned, reference = np.random.default_rng(7).normal(0, 2, (3, B, V))

    def proxy(base, tuned, reference, strength):
        logits = [jnp.asarray(x, jnp.float32) for x in (base, tuned, reference)]
        return proxy_logits(
            base_logits=logits[0], tuned_logits=logits[1], reference_logits=logits[2], strength=strength
        )

    for strength in (0.5, 2.0):
        expected = log_softmax(base + strength * (log_softmax(tuned) - log_softmax(reference)))
        np.testing.assert_allclose(proxy(base, tuned, reference, strength), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(proxy(base, tuned, reference, 0.0), log_softmax(base), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(proxy(base, tuned, base + 3.0, 1.0), log_softmax(tuned), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="strength is -1"):
        proxy(base, tuned, reference, -1.0)


def test_proxy_keeps_words_ruled_out():
    logits = jnp.array([0.3, -0.2, -jnp.inf])
    moved = proxy_logits(base_logits=logits, tuned_logits=logits + 1, reference_logits=logits)
    np.testing.assert_allclose(jnp.exp(moved), jnp.exp(logits) / jnp.exp(logits).sum(), rtol=1e-6)
