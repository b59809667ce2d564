"""Weight tables: which tensor of a checkpoint a variable is, and how its axes are ordered there."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpo_jax.tree import named_leaves
from dpo_jax.types import PyTree

# Ours is torch's, axes in this order: convolutions [out, in, h, w] -> [h, w, in, out], linear [out, in] -> [in, out].
CONVOLUTION, LINEAR = (2, 3, 1, 0), (1, 0)


class Place(NamedTuple):
    """Where a variable stands in a checkpoint.

    Attributes:
      name: of the tensor.
      axes: our array is `numpy.transpose(tensor, axes)`; None leaves it as it is.
      shape: of the tensor before that, if it is not what axes and our shape say (a linear layer kept as a convolution).
    """

    name: str
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None


# Path name of a variable -> place in the checkpoint.
Table = Mapping[str, Place]
# Pairs of a regular expression of our path of a module and the checkpoint's, as `re.sub` takes them.
Renames = Sequence[tuple[str, str]]


def table_of(variables: PyTree, renames: Renames = ()) -> dict[str, Place]:
    """The table of a model whose modules are named as in the checkpoint but for some renames, all of them applied.

    Kernels of rank 2 and 4 become `weight` of linear layers and convolutions, scales and embeddings `weight`, others
    keep their name.

    Args:
      variables: nested dicts of arrays or of their shapes.
    """
    table: dict[str, Place] = {}
    for path, leaf in named_leaves(variables).items():
        module, _, kind = path.rpartition("/")
        for pattern, by in renames:
            module = re.sub(pattern, by, module)
        axes = {2: LINEAR, 4: CONVOLUTION}.get(len(leaf.shape)) if kind == "kernel" else None
        name = "weight" if kind in ("kernel", "scale", "embedding") else kind
        table[path] = Place(".".join([*module.split("/"), name] if module else [name]), axes)
    return table


def tensor_shape(place: Place, leaf: Any) -> tuple[int, ...]:
    """The shape that a variable's tensor has in the checkpoint."""
    if place.shape is not None:
        return place.shape
    if place.axes is None:
        return tuple(leaf.shape)
    shape = [0] * len(leaf.shape)
    for ours, theirs in enumerate(place.axes):
        shape[theirs] = leaf.shape[ours]
    return tuple(shape)
