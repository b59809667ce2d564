"""PPD: attention to users, groups of pairs, an encoder of sets, and opposite users in one model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion.methods.ppd import (
    decoupled_attention,
    encode_users,
    few_shot_groups,
    group_without,
    interpolate_users,
    set_encoder_parameters,
    user_kernels,
)

N, L, M, HEADS, SIZE, FEATURES = 2, 5, 3, 2, 4, 6


def layer(seed=0, *, trained=True):
    keys = jax.random.split(jax.random.key(seed), 5)
    kernels = user_kernels(keys[0], features=FEATURES, heads=HEADS, head_size=SIZE)
    if trained:
        kernels["value"] = jax.random.normal(keys[1], kernels["value"].shape)
    query, attended = (jax.random.normal(key, (N, L, HEADS, SIZE)) for key in keys[2:4])
    return query, attended, jax.random.normal(keys[4], (N, M, FEATURES)), kernels


def numpy_attention(query, attended, user, kernels, there, scale):
    query, attended, user, key, value = (
        np.asarray(x, np.float64) for x in (query, attended, user, kernels["key"], kernels["value"])
    )
    out = attended.copy()
    for n in range(N):
        tokens = user[n][there[n]]
        for h in range(HEADS):
            scores = query[n, :, h] @ (tokens @ key[:, h]).T / np.sqrt(SIZE)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[n, :, h] += scale * (shares / shares.sum(-1, keepdims=True)) @ (tokens @ value[:, h])
    return out


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_attention_is_that_of_float64(scale):
    query, attended, user, kernels = layer()
    there = np.array([[True, True, False], [True, True, True]])
    given = decoupled_attention(query, attended, user, kernels, mask=jnp.asarray(there), scale=scale)
    np.testing.assert_allclose(given, numpy_attention(query, attended, user, kernels, there, scale), atol=1e-5)
    plain = decoupled_attention(query, attended, user, kernels, scale=scale)
    wanted = numpy_attention(query, attended, user, kernels, np.ones((N, M), bool), scale)
    np.testing.assert_allclose(plain, wanted, atol=1e-5)


def test_the_start_is_the_base_and_learns_through_the_values_first():
    query, attended, user, kernels = layer(trained=False)
    np.testing.assert_array_equal(decoupled_attention(query, attended, user, kernels), attended)
    np.testing.assert_array_equal(decoupled_attention(query, attended, user, layer()[3], scale=0.0), attended)
    np.testing.assert_array_equal(decoupled_attention(query, attended, 0 * user, layer()[3]), attended)
    gradient = jax.grad(lambda k: decoupled_attention(query, attended, user, k)[0, 0, 0, 0])(kernels)
    assert np.abs(gradient["value"]).max() > 1e-3 and np.all(gradient["key"] == 0)


def test_order_repetition_and_absence_of_tokens():
    query, attended, user, kernels = layer()
    whole = decoupled_attention(query, attended, user, kernels)
    np.testing.assert_allclose(decoupled_attention(query, attended, user[:, ::-1], kernels), whole, atol=1e-5)
    twice = jnp.concatenate([user, user], axis=1)
    np.testing.assert_allclose(decoupled_attention(query, attended, twice, kernels), whole, atol=1e-5)
    spoiled = jnp.concatenate([user, jnp.full_like(user, jnp.nan)], axis=1)
    mask = jnp.arange(2 * M)[None] < jnp.array([[M], [0]])

    def total(kernels):
        told = decoupled_attention(query, attended, spoiled, kernels, mask=mask)
        return told.sum(), told

    gradient, told = jax.grad(total, has_aux=True)(kernels)
    np.testing.assert_allclose(told[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(told[1], attended[1])  # no token at all
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3 for leaf in gradient.values())


def test_users_are_mixed():
    users = jax.random.normal(jax.random.key(0), (3, M, FEATURES))
    np.testing.assert_array_equal(interpolate_users(users, jnp.array([1.0, 0, 0])), users[0])
    half = interpolate_users(users, jnp.array([0.5, 0.5, 0]))
    np.testing.assert_allclose(half, (users[0] + users[1]) / 2, atol=1e-6)


def test_groups_are_disjoint_and_hold_no_pair_that_is_trained_on():
    pairs = np.arange(100, 122)
    groups = few_shot_groups(0, pairs)
    assert groups.shape == (5, 4) and len(np.unique(groups)) == 20 and np.isin(groups, pairs).all()
    assert not np.array_equal(groups, few_shot_groups(1, pairs))
    np.testing.assert_array_equal(groups, few_shot_groups(0, pairs))
    taken = {group_without(seed, groups, int(groups[2, 1])) for seed in range(60)}
    assert taken == {0, 1, 3, 4}
    assert few_shot_groups(0, pairs[:3]).shape == (0, 4)
    with pytest.raises(ValueError, match="pair 100"):
        group_without(0, np.array([[100, 101, 102, 103]]), 100)
    with pytest.raises(ValueError, match="at least 1"):
        few_shot_groups(0, pairs, size=0)


def test_the_encoder_knows_a_set_of_labelled_pairs():
    params = set_encoder_parameters(jax.random.key(0), features=5, width=16, tokens=M, user_size=FEATURES)
    chosen, rejected = jax.random.normal(jax.random.key(1), (2, N, 4, 5))
    users = encode_users(params, chosen, rejected, tokens=M)
    assert users.shape == (N, M, FEATURES)
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(encode_users(params, chosen[:, order], rejected[:, order], tokens=M), users, atol=1e-5)
    turned = encode_users(params, rejected, chosen, tokens=M)
    assert float(jnp.abs(turned - users).max()) > 0.1  # which image was preferred matters
