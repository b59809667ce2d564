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
      name: of the tensor; `{layer}` stands for the number of the layer if several are stacked.
      axes: our array is `numpy.transpose(tensor, axes)`; None leaves it as it is.
      shape: of the tensor before that, if it is not what axes and our shape say (a linear layer kept as a convolution).
      layers: numbers of the layers that our array's first axis stacks; `axes` and `shape` are those of one layer.
    """

    name: str
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    layers: range | None = None


# Path name of a variable -> place in the checkpoint.
Table = Mapping[str, Place]
# Pairs of a regular expression of our path of a module and the checkpoint's, as `re.sub` takes them.
Renames = Sequence[tuple[str, str]]


def table_of(variables: PyTree, renames: Renames = (), stacks: Mapping[str, range] | None = None) -> dict[str, Place]:
    """The table of a model whose modules are named as in the checkpoint but for some renames, all of them applied.

    Kernels of rank 2 and 4 become `weight` of linear layers and convolutions, scales and embeddings `weight`, others
    keep their name.

    Args:
      variables: nested dicts of arrays or of their shapes.
      stacks: first part of a path -> numbers of the layers that are stacked there; a rename puts `{layer}` in place.
    """
    table: dict[str, Place] = {}
    for path, leaf in named_leaves(variables).items():
        module, _, kind = path.rpartition("/")
        layers = (stacks or {}).get(path.split("/")[0])
        rank = len(leaf.shape) - (layers is not None)
        for pattern, by in renames:
            module = re.sub(pattern, by, module)
        axes = {2: LINEAR, 4: CONVOLUTION}.get(rank) if kind == "kernel" else None
        name = "weight" if kind in ("kernel", "scale", "embedding") else kind
        table[path] = Place(".".join([*module.split("/"), name] if module else [name]), axes, layers=layers)
    return table


def tensor_names(place: Place) -> list[str]:
    """Names of a variable's tensors: one for each layer if it is stacked."""
    return [place.name] if place.layers is None else [place.name.format(layer=layer) for layer in place.layers]


def tensor_shape(place: Place, leaf: Any) -> tuple[int, ...]:
    """The shape that a variable's tensor has in the checkpoint; of each one if it is stacked."""
    own = leaf.shape[0 if place.layers is None else 1 :]
    if place.shape is not None:
        return place.shape
    if place.axes is None:
        return tuple(own)
    shape = [0] * len(own)
    for ours, theirs in enumerate(place.axes):
        shape[theirs] = own[ours]
    return tuple(shape)


def tensor_shapes(table: Table, variables: PyTree) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint.

    Args:
      variables: arrays or their shapes.
    """
    shapes = {}
    for path, leaf in named_leaves(variables).items():
        shapes |= dict.fromkeys(tensor_names(table[path]), tensor_shape(table[path], leaf))
    return shapes
