"""NNX modules as pure functions of nested plain dicts; the only ground file that imports flax."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from dpo_jax.types import PyTree


def functional(module: nnx.Module) -> tuple[Callable[..., Any], PyTree]:
    """Split a module into a pure function and its variables.

    Args:
      module: its parameters (`nnx.Param`) become the variables; every other state (counters, statistics, random
        streams) is at every call what it is now, and is not trained. An abstract module (`nnx.eval_shape`) gives
        abstract variables.

    Returns:
      `apply_fn(variables, *inputs, method=None, **options)`, which calls the module, or a method of it by name; and the
      variables, nested dicts of arrays whose path names are those of the attributes.
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

    return apply_fn, nnx.to_pure_dict(params)
