"""Components of diffusers' folders in and out: config.json beside safetensors, read straight into the sharded layout.

A component (denoiser, autoencoder, text encoder) is a folder of a pipeline's folder. Its files are called
`diffusion_pytorch_model` or, if transformers writes them, `model`; half-precision variants (`fp16`) are read too.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dpo_jax.diffusion.models.table import Place, Table, tensor_names, tensor_shape, tensor_shapes
from dpo_jax.keys import WeightsError
from dpo_jax.sharding import Rules, make_mesh, spec_for
from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import Array, PyTree
from dpo_jax.weights import check_tensors, on_host, open_tensors, read_stack, read_tensor, weight_files, write_tensors

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
VARIANTS = ("fp16",)


def find_files(folder: Path) -> list[Path]:
    """The weight files of a component, in the names of either library.

    Raises:
      WeightsError: there are none.
    """
    stem = DIFFUSERS if any(folder.glob(f"{DIFFUSERS}*.safetensors*")) else TRANSFORMERS
    if stem == TRANSFORMERS and not any(folder.glob(f"{TRANSFORMERS}*.safetensors*")):
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.ckpt") for p in folder.glob(pattern))
        hint = f"; {', '.join(others)} would run code when read: convert them to safetensors" if others else ""
        raise WeightsError(f"{folder}: no {DIFFUSERS}.safetensors and no {TRANSFORMERS}.safetensors{hint}")
    return weight_files(folder, stem, VARIANTS)


def load_model(
    folder: str | Path,
    abstract: PyTree,
    table: Table,
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
    passed_over: Callable[[str], bool] = lambda name: False,
) -> PyTree:
    """Variables of a component, each device's part read by itself; the host holds about one tensor at a time.

    Args:
      abstract: shapes and types of the variables, `abstract_variables` of the model.
      table: its places in the checkpoint.
      mesh: by default the first device alone.
      rules: of the layout.
      passed_over: whether a tensor that the table does not have is nothing wrong.

    Raises:
      WeightsError: anything that is missing, surplus, wrongly shaped or of an unknown type, all of it named.
    """
    folder = Path(folder)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    with open_tensors(find_files(folder)) as tensors:
        return read_variables(tensors, abstract, table, place=folder, mesh=mesh, rules=rules, passed_over=passed_over)


def read_variables(
    tensors: Mapping[str, Any],
    abstract: PyTree,
    table: Table,
    *,
    place: Path,
    mesh: Mesh,
    rules: Rules = (),
    passed_over: Callable[[str], bool] = lambda name: False,
) -> PyTree:
    """As `load_model`, from lazy tensors (`dpo_jax.weights.open_tensors`) whose files are open.

    Args:
      place: of the files, for errors.
    """
    check_tensors(place, tensor_shapes(table, abstract), tensors, passed_over=passed_over)

    def read(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
        sharding = NamedSharding(mesh, spec_for(path, leaf.shape, rules, mesh))
        where = table[path]
        if where.layers is None:
            return read_tensor(tensors[where.name], leaf.shape, leaf.dtype, sharding, axes=where.axes)
        stacked = [tensors[name] for name in tensor_names(where)]
        return read_stack(stacked, (len(stacked),), leaf.shape, leaf.dtype, sharding, axes=where.axes)

    return map_named(read, abstract)


def save_model(
    folder: str | Path,
    variables: PyTree,
    table: Table,
    config: Mapping[str, Any],
    *,
    stem: str = DIFFUSERS,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a component that its library loads; process 0 writes, the others help to gather.

    Args:
      variables: of the model, without adapters (`dpo_jax.lora.merge`).
      config: all of config.json.
      stem: of the weights' names, `DIFFUSERS` or `TRANSFORMERS`.
      dtype: of the tensors; that of the variables by default.
      max_shard_bytes: a file holds at most that many bytes of tensors (one tensor at least).

    Raises:
      ValueError: the variables are not those of the table.
    """
    if unknown := sorted(named_leaves(variables).keys() ^ table.keys()):
        raise ValueError(f"{', '.join(unknown[:8])}: variables and table differ; merge adapters before saving")
    folder = Path(folder)
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    write_tensors(
        folder,
        model_tensors(variables, table, dtype),
        stem=stem,
        max_shard_bytes=max_shard_bytes,
        beside=lambda: (folder / "config.json").write_text(text),
    )


def model_tensors(variables: PyTree, table: Table, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and host copies of a component's tensors, one after another.

    Args:
      variables: or a tree like them, such as gradients.
      dtype: of the tensors; that of the variables by default.
    """
    for path, leaf in named_leaves(variables).items():
        place = table[path]
        for number, name in enumerate(tensor_names(place)):
            values = _stored(place, leaf, on_host(leaf if place.layers is None else _layer(leaf, number)))
            # Not ascontiguousarray, which makes [1] of a scalar.
            yield name, np.asarray(values, dtype or values.dtype, order="C")


@jax.jit
def _layer(stack: Array, number: int) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


def _stored(place: Place, leaf: Array, values: np.ndarray) -> np.ndarray:
    """A variable in the checkpoint's shape and order of axes."""
    turned = values if place.axes is None else np.transpose(values, np.argsort(place.axes))
    return turned.reshape(tensor_shape(place, leaf))
