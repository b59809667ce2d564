"""Numbers that look random and come from a formula, so that fixtures need not hold them; lists of published names."""

import gzip
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import jax.numpy as jnp
import numpy as np

from dpo_jax.tree import map_named
from dpo_jax.types import PyTree


def chirp(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [-1, 1], another sequence for each name."""
    places = np.arange(int(np.prod(shape)), dtype=np.float64)
    return np.sin(0.3717 * places**2 + 1.3 * places + crc32(name.encode()) % 1000).reshape(shape).astype(np.float32)


def tensor(name: str, shape: tuple[int, ...], scale: float = 0.5) -> np.ndarray:
    """A tensor of a checkpoint: weights of norms are about one, matrices fall with their number of inputs."""
    noise = chirp(name, tuple(shape))
    if len(shape) == 1:
        return (noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).astype(np.float32)
    return (noise * scale * 2 / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)


def fill(module) -> None:
    """Write the formula's numbers into a torch module."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(tensor(name, tuple(parameter.shape))))


def read(abstract: PyTree, table: Mapping, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """Variables out of tensors by name, as their table says."""

    def one(path: str, leaf):
        place = table[path]
        values = np.asarray(tensors[place.name])
        axes = range(values.ndim) if place.axes is None else place.axes
        values = np.transpose(values, tuple(axes)).reshape(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return map_named(one, abstract)


def write_published(file: Path, models: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """One line for each tensor: model, name, sizes."""
    lines = [
        " ".join([model, name, *map(str, shape)]) + "\n"
        for model, shapes in models.items()
        for name, shape in shapes.items()
    ]
    file.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def read_published(file: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """What `write_published` wrote."""
    models: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        model, name, *shape = line.split(" ")
        models.setdefault(model, {})[name] = tuple(map(int, shape))
    return models
