"""Hugging Face checkpoints in and out: one table per family, read lazily into the sharded layout, safetensors only."""

import json
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from dpo_jax.language.models.decoder import RULES, DecoderConfig, abstract_variables, init_variables
from dpo_jax.language.models.families.table import Place, Table
from dpo_jax.language.models.folder import (
    WeightsError,
    config_from_hf,
    config_to_hf,
    family_of,
    local_folder,
    read_config,
)
from dpo_jax.sharding import Rules, make_mesh, spec_for
from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import Array, PyTree

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_SHOWN = 8  # names that an error lists of each kind


# Buffers that old checkpoints carry and no model reads.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
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
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = f"; {', '.join(others)} would run code when read: convert them to safetensors" if others else ""
    raise WeightsError(f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}{hint}")


def weight_table(config: DecoderConfig) -> Table:
    """Path name of a variable -> place in the checkpoint, for the config's family."""
    return family_of(config.family).table(config)


def _tensor_names(path: str, place: Place, config: DecoderConfig) -> list[str]:
    """Names in the checkpoint of a variable: one for each layer if it is stacked."""
    return [place.name.format(layer=i) for i in range(config.layers)] if path.startswith("layers/") else [place.name]


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint."""
    table, wanted = weight_table(config), {}
    for path, leaf in named_leaves(abstract_variables(config)).items():
        place, shape = table[path], tuple(leaf.shape[1:] if path.startswith("layers/") else leaf.shape)
        if place.part is not None:
            shape = (*shape[:-1], place.part.whole * place.part.groups)
        wanted |= dict.fromkeys(_tensor_names(path, place, config), shape[::-1] if place.transposed else shape)
    return wanted


def _check_tensors(folder: Path, config: DecoderConfig, shapes: Mapping[str, tuple]) -> None:
    """One error that names all tensors that are missing, surplus or of a wrong shape."""
    table, wanted = weight_table(config), tensor_shapes(config)
    missing = sorted(wanted.keys() - shapes.keys())
    surplus = sorted(name for name in shapes.keys() - wanted.keys() if not _IGNORED.search(name))
    if starts_reward(config, shapes):
        missing = [name for name in missing if name != table["score/weight"].name]
    if config.tie_embeddings or config.reward:
        heads = {table[path].name for path in ("head/embedding", "head_bias/bias")}
        surplus = [name for name in surplus if name not in heads]
    wrong = [
        f"{n} is {list(shapes[n])}, expected {list(s)}" for n, s in wanted.items() if n in shapes and shapes[n] != s
    ]
    problems = {"missing": missing, "surplus": surplus, "of a wrong shape": wrong}
    if any(problems.values()):
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
            for kind, names in problems.items()
            if names
        ]
        raise WeightsError(f"{folder}: the tensors do not fit config.json; {'; '.join(parts)}")


def starts_reward(config: DecoderConfig, names: Container[str]) -> bool:
    """Whether a reward model begins as a language model: its head is then new, and the vocabulary's is left aside."""
    return config.reward and weight_table(config)["score/weight"].name not in names


def _full_name(name: str, names: Container[str], config: DecoderConfig) -> str:
    """A tensor's name as the table has it: some checkpoints are of the model without its head, and lack its prefix."""
    prefix = family_of(config.family).PREFIX
    return name if name in names or f"{prefix}{name}" not in names else f"{prefix}{name}"


def load_hf(
    model: str | Path,
    *,
    config: DecoderConfig | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
) -> tuple[DecoderConfig, PyTree]:
    """Read a checkpoint straight into its layout on a mesh; the host holds about one tensor at a time.

    Args:
      model: folder or hub id.
      config: how it shall run (dtypes, remat); its shape is that of config.json. By default float32. With `reward` a
        language model gets a new reward head, the same in every call.
      mesh: by default the first device alone.
      rules: of the layout.

    Returns:
      The config, and the variables in the config's `param_dtype`.

    Raises:
      WeightsError: anything that is missing, surplus, wrongly shaped or of an unknown type, all of it named.
    """
    folder = local_folder(model)
    config = config or config_from_hf(read_config(folder), place=str(folder / "config.json"))
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    abstract, table = abstract_variables(config), weight_table(config)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
                where |= {name: file for name in file.keys()}  # noqa: SIM118
            except Exception as error:  # safetensors raises a type of its own
                raise WeightsError(f"{path}: not a safetensors file ({error})") from error
        expected = tensor_shapes(config)
        slices = {_full_name(name, expected, config): file.get_slice(name) for name, file in where.items()}
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        _check_tensors(folder, config, shapes)
        if odd := sorted({f"{n} ({s.get_dtype()})" for n, s in slices.items() if s.get_dtype() not in DTYPES}):
            raise WeightsError(
                f"{folder}: tensors of unknown type: {', '.join(odd[:_SHOWN])}; expected {', '.join(DTYPES)}"
            )

        def read(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
            spec = spec_for(path, leaf.shape, rules, mesh)
            place = table[path]
            names = _tensor_names(path, place, config)
            if names[0] not in slices:
                new = jax.jit(lambda: init_variables(config, jax.random.key(0))["score"]["weight"])
                return jax.device_put(new(), NamedSharding(mesh, spec))
            if not path.startswith("layers/"):
                return _read_tensor(slices[names[0]], leaf.shape, leaf.dtype, NamedSharding(mesh, spec), place)
            whole, one = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec(*spec[1:]))
            filled = jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=whole)()
            put = jax.jit(lambda all, new, i: all.at[i].set(new), donate_argnums=0, out_shardings=whole)
            for number, name in enumerate(names):
                layer = _read_tensor(slices[name], leaf.shape[1:], leaf.dtype, one, place)
                filled = put(filled, layer, number)
            return filled

        return config, map_named(read, abstract)


def _read_tensor(piece: Any, shape: tuple, dtype: Any, sharding: NamedSharding, place: Place) -> Array:
    """One tensor or part of one, each device's part read by itself."""

    def part(index: Any) -> np.ndarray:  # a tuple of slices
        columns = None
        if place.part is not None:
            columns = place.part.places(np.arange(*index[-1].indices(shape[-1])))
            index = (*index[:-1], slice(columns.min(), columns.max() + 1))
        values = np.asarray(piece[index[::-1] if place.transposed else index])
        values = values.T if place.transposed else values
        return (values if columns is None else values[..., columns - columns.min()]).astype(dtype)

    return jax.make_array_from_callback(shape, sharding, part)


def save_hf(
    folder: str | Path,
    config: DecoderConfig,
    variables: PyTree,
    *,
    source: Path | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that transformers loads; process 0 writes, the others help to gather.

    Args:
      config, variables: of the decoder.
      source: folder whose tokenizer, chat template, generation config and other config keys are carried along.
      dtype: of the tensors; that of the variables by default.
      max_shard_bytes: a file holds at most that many bytes of tensors (one tensor at least).
    """
    folder, writes = Path(folder), jax.process_index() == 0
    before = read_config(source) if source is not None and writes else {}
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("shard-*.partial"):
            left.unlink()
    sizes: dict[str, int] = {}
    shards: list[list[str]] = []
    for shard in _shards(checkpoint_tensors(config, variables, dtype), max_shard_bytes):
        sizes |= {name: tensor.nbytes for name, tensor in shard.items()}
        shards.append(list(shard))
        if writes:
            save_file(shard, folder / f"shard-{len(shards)}.partial", metadata={"format": "pt"})
    if writes:
        # Old weights stay until all new ones are written, and those get their names last: whatever fails between, the
        # folder never holds weights and a config that do not belong together.
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        _write_configs(folder, config, before, source, np.dtype(dtype or config.param_dtype).name)
        _name_shards(folder, shards, sum(sizes.values()))


def checkpoint_tensors(config: DecoderConfig, variables: PyTree, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and host copies of a checkpoint's tensors, one after another; parts of one tensor are put together.

    Args:
      variables: or a tree like them, such as gradients.
      dtype: of the tensors; that of the variables by default.
    """
    table = weight_table(config)
    together: dict[str, dict[str, Array]] = {}
    for path, leaf in named_leaves(variables).items():
        together.setdefault(table[path].name, {})[path] = leaf
    for leaves in together.values():
        first = next(iter(leaves))
        for number, name in enumerate(_tensor_names(first, table[first], config)):
            parts = {path: _on_host(x[number] if path.startswith("layers/") else x) for path, x in leaves.items()}
            values = _fused({table[path]: part for path, part in parts.items()})
            values = values.T if table[first].transposed else values
            yield name, np.ascontiguousarray(values.astype(dtype or values.dtype))


def _fused(parts: Mapping[Place, np.ndarray]) -> np.ndarray:
    """The tensor that parts make up, in our orientation."""
    place, values = next(iter(parts.items()))
    if place.part is None:
        return values
    together = np.empty((*values.shape[:-1], place.part.whole * place.part.groups), values.dtype)
    for place, values in parts.items():
        if place.part is not None:
            together[..., place.part.places(np.arange(values.shape[-1]))] = values
    return together


def _on_host(array: Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _shards(tensors: Iterable[tuple[str, np.ndarray]], most: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the files their names, which hold the number of files, and write the index if there are several."""
    # Only now, for a run that dies while it writes must leave the weights that were there.
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if len(shards) == 1:
        (folder / "shard-1.partial").rename(folder / WEIGHTS_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.partial").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))


def _write_configs(
    folder: Path, config: DecoderConfig, before: dict[str, Any], source: Path | None, dtype: str
) -> None:
    """config.json with the source's other keys (special tokens, ...), and the files that are carried along."""
    for stale in ("rope_scaling", "torch_dtype", "quantization_config", "_name_or_path"):
        before.pop(stale, None)
    after = {**before, **config_to_hf(config), "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(after, indent=1) + "\n")
    if source is not None and source.resolve() != folder.resolve():
        for pattern in (*CARRIED, "generation_config.json"):
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
