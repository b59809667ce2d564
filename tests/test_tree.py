"""Pytrees by path name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.tree import combine, interpolate, map_named, named_leaves, partition, tree_bytes


def tree():
    return {"layers": {"norm": {"scale": jnp.ones(3)}, "up": [jnp.arange(4.0), jnp.zeros((2, 2))]}, "head": jnp.ones(1)}


def test_names_follow_the_path():
    assert list(named_leaves(tree())) == ["head", "layers/norm/scale", "layers/up/0", "layers/up/1"]
    seen = []
    map_named(lambda name, leaf: seen.append(name), tree())
    assert seen == list(named_leaves(tree()))


def test_partition_and_combine_are_inverse():
    chosen, rest = partition(tree(), lambda name: "up" in name)
    assert list(named_leaves(chosen)) == ["layers/up/0", "layers/up/1"]
    assert list(named_leaves(rest)) == ["head", "layers/norm/scale"]
    jax.tree.map(np.testing.assert_array_equal, combine(chosen, rest), tree())
    jax.tree.map(np.testing.assert_array_equal, combine(rest, chosen), tree())


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_interpolation_is_exact_at_the_ends_and_keeps_the_dtype(rate):
    old = {"a": jnp.array([0.1, -3.0], jnp.bfloat16)}
    new = {"a": jnp.array([7.3, 1e-3], jnp.float32)}
    mixed = interpolate(old, new, rate)["a"]
    assert mixed.dtype == jnp.bfloat16
    expected = (1 - rate) * np.asarray(old["a"], np.float32) + rate * np.asarray(new["a"])
    np.testing.assert_array_equal(mixed, expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(interpolate(new, new, 1.0)["a"], new["a"])


def test_bytes():
    assert tree_bytes(tree()) == 4 * (3 + 4 + 4 + 1)
