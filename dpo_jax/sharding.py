"""Meshes, rules from path names to shardings, and global batches from per-host slices.

Four axes: `data` replicates the parameters, `fsdp` shards them and the batch, `expert` shards experts and the batch,
`model` splits heads, hidden units and the vocabulary. The batch falls on `expert` too, because all that is no expert
would else be computed once for each of its shards. A rule is a pair of a regular expression and a PartitionSpec; the
first that matches a leaf's path name decides, and axes that do not divide a dimension are dropped there.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import Array, PyTree

P = PartitionSpec
Rules = Sequence[tuple[str, PartitionSpec]]

AXES = ("data", "fsdp", "expert", "model")
BATCH_AXES = ("data", "fsdp", "expert")
EXPERT_AXIS, MODEL_AXIS = "expert", "model"


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    model: int = 1,
    expert: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Mesh over the axes data, fsdp, expert, model; one of the sizes may be -1 and takes what is left.

    Args:
      slices: number of TPU slices (or hosts groups joined by a slow network) that the data axis spans; the others stay
        inside a slice.
      devices: all devices of all processes by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "model": model}
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or known < 1 or len(devices) % known:
        raise ValueError(f"mesh {sizes} does not fit {len(devices)} devices; give sizes that multiply to that number")
    if free:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {sizes} needs {math.prod(sizes.values())} devices and there are {len(devices)}")
    if sizes["data"] % slices:
        raise ValueError(f"data axis of {sizes['data']} cannot span {slices} slices; it must be a multiple of them")
    types = (AxisType.Auto,) * len(AXES)
    if slices > 1:
        by_slice = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))
        return Mesh(np.array(by_slice).reshape(tuple(sizes.values())), AXES, axis_types=types)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh` around the traced code, or None outside one, on one device or inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    return mesh


def axes_size(mesh: Mesh | jax.sharding.AbstractMesh, axes: str | Sequence[str] | None) -> int:
    """Number of shards that an entry of a PartitionSpec makes; axes that the mesh lacks count 1."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape.get(name, 1) for name in names)


def fit_spec(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """The spec without axes that the mesh lacks or that do not divide their dimension."""
    entries = list(spec)[: len(shape)]
    kept = []
    for axes, size in zip(entries, shape):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        names = tuple(name for name in names if mesh.shape.get(name, 1) > 1)
        divides = names and size % axes_size(mesh, names) == 0
        kept.append((names[0] if len(names) == 1 else names) if divides else None)
    return P(*kept)


def constrain(x: Array, *entries: str | Sequence[str] | None) -> Array:
    """Lay an intermediate array out over the active mesh; without one, return it as it is."""
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(P(*entries), x.shape, mesh))


def spec_for(name: str, shape: Sequence[int], rules: Rules, mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """Spec of the first rule that matches the path name; replicated where none does."""
    for pattern, spec in rules:
        if re.search(pattern, name):
            return fit_spec(spec, shape, mesh)
    return P()


def tree_shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """NamedSharding of each leaf (array or ShapeDtypeStruct) of a tree of parameters."""
    return map_named(lambda name, leaf: NamedSharding(mesh, spec_for(name, leaf.shape, rules, mesh)), tree)


def like_parameters(tree: PyTree, params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """Shardings of a tree that holds copies of the parameters, such as an optimizer's state.

    A leaf whose path name ends in a parameter's name takes that parameter's spec when the shapes are equal, the spec
    without the missing dimension when one is missing (Adafactor's factored moments), and is replicated otherwise.
    """
    known = named_leaves(params)

    def sharding(name: str, leaf: Array) -> NamedSharding:
        parts = name.split("/")
        owner = next((n for n in ("/".join(parts[i:]) for i in range(len(parts))) if n in known), None)
        if owner is None:
            return NamedSharding(mesh, P())
        shape, kept = known[owner].shape, tuple(leaf.shape)
        spec = list(spec_for(owner, shape, rules, mesh)) + [None] * len(shape)
        if kept == tuple(shape):
            return NamedSharding(mesh, P(*spec[: len(shape)]))
        for gone in reversed(range(len(shape))):
            if kept == tuple(shape[:gone]) + tuple(shape[gone + 1 :]):
                return NamedSharding(mesh, P(*(entry for i, entry in enumerate(spec[: len(shape)]) if i != gone)))
        return NamedSharding(mesh, P())

    return map_named(sharding, tree)


def batch_shardings(batch: PyTree, mesh: Mesh) -> PyTree:
    """Leading axis over the axes of the batch, the rest replicated."""
    return jax.tree.map(lambda leaf: _batch_sharding(mesh), batch)


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Global arrays from this process's slice of the batch (leading axis), spread over data, fsdp and expert."""

    def put(leaf: np.ndarray) -> Array:
        return jax.make_array_from_process_local_data(_batch_sharding(mesh), np.asarray(leaf))

    return jax.tree.map(put, batch)


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(tuple(axis for axis in BATCH_AXES if axis in mesh.shape)))


def data_shards(mesh: Mesh) -> int:
    """Number of parts that a batch falls into."""
    return axes_size(mesh, BATCH_AXES)
