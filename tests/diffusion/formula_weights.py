"""Numbers that look random and come from a formula, so that fixtures need not hold them; lists of published names."""

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from zlib import crc32

import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.models.table import tensor_names
from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import PyTree


def chirp(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 in [-1, 1], another sequence for each name."""
    places = np.arange(int(np.prod(shape)), dtype=np.float64)
    return np.sin(0.3717 * places**2 + 1.3 * places + crc32(name.encode()) % 1000).reshape(shape).astype(np.float32)


def tensor(name: str, shape: tuple[int, ...], scale: float = 0.5) -> np.ndarray:
    """A tensor of a checkpoint: weights of norms are about one, matrices fall with their number of inputs."""
    noise = chirp(name, tuple(shape))
    if len(shape) == 1:
        value = noise * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    else:
        value = noise * scale * 2 / np.sqrt(max(1, np.prod(shape[1:])))
    return np.asarray(value, np.float32)


def fill(module, file_name: Callable[[str], str] = lambda name: name) -> None:
    """Write the formula's numbers into a torch module, by the names that its parameters have in a file."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.tensor(tensor(file_name(name), tuple(parameter.shape))))


def read(abstract: PyTree, table: Mapping, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """Variables out of tensors by name, as their table says."""

    def one(path: str, leaf):
        place = table[path]
        values = [np.asarray(tensors[name]) for name in tensor_names(place)]
        if place.axes is not None:
            values = [np.transpose(value, place.axes) for value in values]
        return jnp.asarray(np.stack(values) if place.layers is not None else values[0], leaf.dtype)

    return map_named(one, abstract)


def by_tensor(tree: PyTree, table: Mapping) -> np.ndarray:
    """All numbers of a tree like the variables, such as gradients, by the names of the checkpoint's tensors."""
    found = {}
    for path, leaf in named_leaves(tree).items():
        place, leaf = table[path], np.asarray(leaf)
        for name, value in zip(tensor_names(place), leaf if place.layers is not None else [leaf]):
            found[name] = (value if place.axes is None else np.transpose(value, np.argsort(place.axes))).ravel()
    return np.concatenate([found[name] for name in sorted(found)])


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
