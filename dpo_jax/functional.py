"""NNX modules as pure functions of nested plain dicts; the only ground file that imports flax."""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import jax
from flax import nnx

from dpo_jax.tree import named_leaves
from dpo_jax.types import PyTree


def functional(module: nnx.Module) -> tuple[Callable[..., Any], PyTree]:
    """Split a module into a pure function and its variables.

    Args:
      module: its parameters (`nnx.Param`) become the variables; every other state (counters, statistics, random
        streams) is at every call what it is now, and is not trained. An abstract module (`nnx.eval_shape`) gives
        abstract variables.

    Returns:
      `apply_fn(variables, *inputs, method=None, **options)`, which calls the module, or a method of it by name; and the
      variables, nested dicts of arrays whose path names are those of the attributes, with digits for places in lists.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    # Shapes only: the arrays themselves would keep a second copy of the model alive.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)

    def apply_fn(variables: PyTree, *inputs: Any, method: str | None = None, **options: Any) -> Any:
        # Copies: the variables are written into one, and a call may write into the other.
        state, others = jax.tree.map(lambda leaf: leaf, (shapes, rest))
        nnx.replace_by_pure_dict(state, variables)
        merged = nnx.merge(graphdef, state, others)
        return (merged if method is None else getattr(merged, method))(*inputs, **options)

    return apply_fn, _with_names(nnx.to_pure_dict(params))


def abstract_module(make: Callable[..., nnx.Module], config: Hashable, **options: Hashable) -> Any:
    """The module `make(config, **options, rngs=...)` with shapes in place of arrays, a new one at each call."""
    return nnx.eval_shape(lambda: make(config, **options, rngs=nnx.Rngs(0)))


def function_of(make: Callable[..., nnx.Module], config: Hashable, **options: Hashable) -> Callable[..., Any]:
    """`functional`'s function of the module that `make` builds, without making any weights."""
    return _made_once(make, config, **options)[0]


def shapes_of(make: Callable[..., nnx.Module], config: Hashable, **options: Hashable) -> PyTree:
    """`functional`'s variables of the module that `make` builds, as shapes and dtypes; the caller's to change."""
    return jax.tree.map(lambda leaf: leaf, _made_once(make, config, **options)[1])


@cache
def _made_once(make: Callable[..., nnx.Module], config: Hashable, **options: Hashable) -> tuple[Callable, PyTree]:
    """A run asks for both often, and tracing a module takes seconds."""
    return functional(abstract_module(make, config, **options))


def _with_names(tree: PyTree) -> PyTree:
    """Keys as text: places in lists too, so that path names lead back to them."""
    return {str(key): _with_names(part) for key, part in tree.items()} if isinstance(tree, dict) else tree


def set_adapters(module: nnx.Module, adapters: PyTree) -> None:
    """Make room for adapters (`dpo_jax.lora`) in an abstract module, in place.

    Args:
      module: from `nnx.eval_shape`; its linear layers have an attribute for each leaf of an adapter, None before.
      adapters: of the variables that the function will get, arrays or their shapes; None for none. A digit in a path
        is a place in a list.

    Raises:
      ValueError: an adapter of what is no linear layer.
    """
    for path, leaf in named_leaves(adapters).items():
        *owners, name = path.split("/")
        owner: Any = module
        for part in owners:
            if part.isdigit():
                owner = owner[int(part)] if isinstance(owner, nnx.List) and int(part) < len(owner) else None
            else:
                owner = getattr(owner, part, None)
        if not isinstance(owner, nnx.Module) or not hasattr(owner, name):
            raise ValueError(f"{path}: the model has no linear layer there; these adapters belong to another model")
        setattr(owner, name, nnx.data(nnx.Param(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))))
