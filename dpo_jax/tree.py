"""Pytrees by path name: select, split, join and mix their leaves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpo_jax.types import PyTree


def path_name(path: tuple) -> str:
    """Slash-joined name of a key path, e.g. `layers/attention/query/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def named_leaves(tree: PyTree) -> dict[str, PyTree]:
    """Leaves of a pytree keyed by path name, in the tree's own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(function: Callable[..., PyTree], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` whose function also gets the path name as its first argument."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def partition(tree: PyTree, selected: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Split a tree by path name into (selected, rest), each with None where the other has the leaf."""
    chosen = map_named(lambda name, leaf: leaf if selected(name) else None, tree)
    rest = map_named(lambda name, leaf: None if selected(name) else leaf, tree)
    return chosen, rest


def combine(*trees: PyTree) -> PyTree:
    """Join trees made by `partition`: at each place the first leaf that is not None."""

    def first(*leaves: PyTree) -> PyTree:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def interpolate(old: PyTree, new: PyTree, rate: float | jax.Array) -> PyTree:
    """Leafwise `(1 - rate) * old + rate * new`, computed in float32 and kept in the dtype of `old`.

    The soft reference update of TR-DPO (arXiv 2404.09656, eq. 5) and the moving average of parameters.
    """

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
        # At rate 1 the difference form a + (b - a) would not give b back exactly.
        return ((1 - rate) * a32 + rate * b32).astype(a.dtype)

    return jax.tree.map(mix, old, new)


def tree_bytes(tree: PyTree) -> int:
    """Bytes that the arrays (or ShapeDtypeStructs) of a tree hold in all, over all devices, each counted once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
