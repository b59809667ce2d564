"""Checkpoints of safetensors apart from what is in them: files of a folder, tensors read into a layout, shards written.

A checkpoint is `STEM.safetensors`, or an index `STEM.safetensors.index.json` and the files that it names. A tensor is
read lazily, each device's part by itself; several that differ in a number (of a layer) are stacked on the way.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from dpo_jax.keys import WeightsError
from dpo_jax.types import Array

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SHOWN = 8  # names that an error lists of each kind


def weights_file(stem: str) -> str:
    """Name of a checkpoint's only file."""
    return f"{stem}.safetensors"


def index_file(stem: str, variant: str | None = None) -> str:
    """Name of the index of a checkpoint of several files."""
    return f"{stem}.safetensors.index.{f'{variant}.' if variant else ''}json"


def weight_files(folder: Path, stem: str = "model", variants: Sequence[str] = ()) -> list[Path]:
    """The files of a checkpoint.

    Args:
      variants: that will do if the plain files are not there, such as `fp16` (`STEM.fp16.safetensors`).

    Raises:
      WeightsError: there are none, or the index cannot be used.
    """
    for variant in (None, *variants):
        index = folder / index_file(stem, variant)
        if index.exists():
            return _indexed_files(index)
        one = folder / weights_file(f"{stem}.{variant}" if variant else stem)
        if one.exists():
            return [one]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = f"; {', '.join(others)} would run code when read: convert them to safetensors" if others else ""
    raise WeightsError(f"{folder}: no {weights_file(stem)} and no {index_file(stem)}{hint}")


def _indexed_files(index: Path) -> list[Path]:
    folder = index.parent
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: expected an object with 'weight_map' ({error})") from error
    if outside or not names:
        raise WeightsError(f"{index}: names {', '.join(outside) or 'no file'}; expected files of this folder")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise WeightsError(f"{folder}: the index names {', '.join(missing)}, which are not there")
    return [folder / name for name in names]


@contextmanager
def open_tensors(files: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Name -> lazy tensor (safetensors' slice) of all files, which stay open inside the context.

    Raises:
      WeightsError: a file is not what its name says.
    """
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in files:
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                where |= {name: file for name in file.keys()}  # noqa: SIM118
            except Exception as error:  # safetensors raises a type of its own
                raise WeightsError(f"{path}: not a safetensors file ({error})") from error
        yield {name: file.get_slice(name) for name, file in where.items()}


def check_tensors(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Any],
    *,
    may_miss: Collection[str] = (),
    passed_over: Callable[[str], bool] = lambda name: False,
) -> None:
    """One error that names all tensors that are missing, surplus, of a wrong shape or of an unknown type.

    Args:
      expected: name -> shape.
      tensors: of `open_tensors`.
      may_miss: expected ones that need not be there.
      passed_over: whether a surplus one is nothing wrong, of whatever type.

    Raises:
      WeightsError: that error.
    """
    shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    problems = {
        "missing": sorted(expected.keys() - shapes.keys() - set(may_miss)),
        "surplus": sorted(name for name in shapes.keys() - expected.keys() if not passed_over(name)),
        "of a wrong shape": [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    if any(problems.values()):
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise WeightsError(f"{folder}: the tensors do not fit config.json; {'; '.join(parts)}")
    read = {name: tensor.get_dtype() for name, tensor in tensors.items() if name in expected}
    if odd := sorted(f"{name} ({dtype})" for name, dtype in read.items() if dtype not in DTYPES):
        raise WeightsError(
            f"{folder}: tensors of unknown type: {', '.join(odd[:_SHOWN])}; expected {', '.join(DTYPES)}"
        )


def read_tensor(
    tensor: Any,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    *,
    axes: tuple[int, ...] | None = None,
    columns: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Array:
    """One tensor or a part of one, each device's part read by itself.

    Args:
      tensor: of `open_tensors`; it may have more axes than `shape` if those behind are 1.
      shape: of the result.
      axes: the result is `numpy.transpose(tensor, axes)`.
      columns: where entries of the result's last axis stand in the tensor's, if it holds more.
    """
    order = tuple(range(len(shape))) if axes is None else axes
    ones = len(tensor.get_shape()) - len(shape)

    def part(index: Any) -> np.ndarray:  # a tuple of slices
        places = None
        if columns is not None:
            places = columns(np.arange(*index[-1].indices(shape[-1])))
            index = (*index[:-1], slice(places.min(), places.max() + 1))
        stored = tuple(index[order.index(axis)] for axis in range(len(order)))
        values = np.asarray(tensor[(*stored, *(slice(None),) * ones)])
        values = np.transpose(values.reshape(values.shape[: len(shape)]), order)
        return (values if places is None else values[..., places - places.min()]).astype(dtype)

    return jax.make_array_from_callback(shape, sharding, part)


def read_stack(
    tensors: Sequence[Any],
    lead: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    **how: Any,
) -> Array:
    """Tensors stacked, read one after another.

    Args:
      tensors: by the leading axes, the last of them fastest.
      lead: sizes of those axes.
      shape: of the result, with the leading axes.
      sharding: of the result; its leading axes are not split.
      how: of `read_tensor`.
    """
    spec = PartitionSpec(*sharding.spec[len(lead) :])
    empty, put = _stacking(shape, dtype, sharding)
    filled = empty()
    for number, tensor in enumerate(tensors):
        one = read_tensor(tensor, shape[len(lead) :], dtype, NamedSharding(sharding.mesh, spec), **how)
        filled = put(filled, one, tuple(np.unravel_index(number, lead)))
    return filled


@lru_cache(maxsize=512)
def _stacking(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> tuple[Callable, Callable]:
    """An empty stack, and the stack with one tensor more; the same functions for equal arguments, compiled once."""
    empty = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)
    put = jax.jit(lambda all, new, place: all.at[place].set(new), donate_argnums=0, out_shardings=sharding)
    return empty, put


def on_host(array: Array) -> np.ndarray:
    """The whole array; all processes call this together."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    stem: str = "model",
    max_shard_bytes: int = 5_000_000_000,
    beside: Callable[[], object] = lambda: None,
) -> None:
    """Write a checkpoint; process 0 writes, the others help to gather.

    Old weights stay until all new ones are written, and those get their names last: whatever fails between, the folder
    never holds weights and a config that do not belong together.

    Args:
      tensors: names and host copies, made while they are written.
      max_shard_bytes: a file holds at most that many bytes of tensors (one tensor at least).
      beside: writes the config, after the old weights are gone and before the new ones have names.
    """
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("shard-*.partial"):
            left.unlink()
    sizes: dict[str, int] = {}
    shards: list[list[str]] = []
    for shard in _shards(tensors, max_shard_bytes):
        sizes |= {name: tensor.nbytes for name, tensor in shard.items()}
        shards.append(list(shard))
        if writes:
            save_file(shard, folder / f"shard-{len(shards)}.partial", metadata={"format": "pt"})
    if writes:
        for old in folder.glob(f"{stem}*.safetensors*"):
            old.unlink()
        beside()
        _name_shards(folder, stem, shards, sum(sizes.values()))


def _shards(tensors: Iterable[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _name_shards(folder: Path, stem: str, shards: list[list[str]], total: int) -> None:
    """Give the files their names, which hold the number of files, and write the index if there are several."""
    if len(shards) == 1:
        (folder / "shard-1.partial").rename(folder / weights_file(stem))
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = weights_file(f"{stem}-{number:05d}-of-{len(shards):05d}")
        (folder / f"shard-{number}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index_file(stem)).write_text(json.dumps(index, indent=1))


def local_folder(model: str | Path, patterns: Sequence[str]) -> Path:
    """The folder itself, or a hub id's files of some patterns in the hub's cache.

    Raises:
      WeightsError: neither a folder nor a hub id that can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(patterns)))
    except Exception as error:  # offline, no such id, no permission: the hub has many names for it
        raise WeightsError(f"{model} is neither a folder here nor a model that the hub gives ({error})") from error
