"""Hugging Face checkpoints in and out: one table per family, read lazily into the sharded layout, safetensors only."""

import json
import re
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

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
from dpo_jax.quantize import Kind, quantize
from dpo_jax.sharding import Rules, make_mesh, spec_for
from dpo_jax.tree import map_named, named_leaves
from dpo_jax.types import Array, PyTree
from dpo_jax.weights import (
    DTYPES,
    check_tensors,
    index_file,
    on_host,
    open_tensors,
    read_stack,
    read_tensor,
    weight_files,
    weights_file,
    write_tensors,
)

__all__ = [
    "DTYPES",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "WeightsError",
    "checkpoint_tensors",
    "load_hf",
    "save_hf",
    "starts_reward",
    "tensor_shapes",
    "weight_table",
]

INDEX_FILE, WEIGHTS_FILE = index_file("model"), weights_file("model")
CARRIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
# Buffers that old checkpoints carry and no model reads.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")


def weight_table(config: DecoderConfig) -> Table:
    """Path name of a variable -> place in the checkpoint, for the config's family."""
    return family_of(config.family).table(config)


def _stacked(path: str, place: Place, config: DecoderConfig) -> tuple[int, ...]:
    """The leading axes of a variable that are one tensor each in the checkpoint: layers, and experts in them."""
    if not path.startswith("layers/"):
        return ()
    return (config.layers, config.experts) if "{expert}" in place.name else (config.layers,)


def _tensor_names(path: str, place: Place, config: DecoderConfig) -> dict[tuple[int, ...], str]:
    """Names in the checkpoint of a variable, by where the tensor stands in its leading axes."""
    places = np.ndindex(*_stacked(path, place, config))
    return {index: place.name.format(**dict(zip(("layer", "expert"), index))) for index in places}


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint."""
    table, wanted = weight_table(config), {}
    for path, leaf in named_leaves(abstract_variables(config)).items():
        place = table[path]
        shape = tuple(leaf.shape[len(_stacked(path, place, config)) :])
        if place.part is not None:
            shape = (*shape[:-1], place.part.whole * place.part.groups)
        names = _tensor_names(path, place, config).values()
        wanted |= dict.fromkeys(names, shape[::-1] if place.transposed else shape)
    return wanted


def _check(folder: Path, config: DecoderConfig, tensors: Mapping[str, Any]) -> None:
    """One error that names all tensors that are missing, surplus or of a wrong shape."""
    table = weight_table(config)
    tied = config.tie_embeddings or config.reward
    heads = {table[path].name for path in ("head/embedding", "head_bias/bias")} if tied else set()
    check_tensors(
        folder,
        tensor_shapes(config),
        tensors,
        may_miss=(table["score/weight"].name,) if starts_reward(config, tensors) else (),
        passed_over=lambda name: name in heads or _IGNORED.search(name) is not None,
    )


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
    kernels: Kind | None = None,
) -> tuple[DecoderConfig, PyTree]:
    """Read a checkpoint straight into its layout on a mesh; the host holds about one tensor at a time.

    Args:
      model: folder or hub id.
      config: how it shall run (dtypes, remat); its shape is that of config.json. By default float32. With `reward` a
        language model gets a new reward head, the same in every call.
      mesh: by default the first device alone.
      rules: of the layout.
      kernels: kept in few bits (`dpo_jax.quantize`), of which one at a time is whole; None as they are.

    Returns:
      The config, and the variables in the config's `param_dtype`.

    Raises:
      WeightsError: anything that is missing, surplus, wrongly shaped or of an unknown type, all of it named.
    """
    folder = local_folder(model)
    config = config or config_from_hf(read_config(folder), place=str(folder / "config.json"))
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    abstract, table = abstract_variables(config), weight_table(config)
    expected = tensor_shapes(config)
    with open_tensors(weight_files(folder)) as found:
        tensors = {_full_name(name, expected, config): tensor for name, tensor in found.items()}
        _check(folder, config, tensors)

        def read(path: str, leaf: jax.ShapeDtypeStruct) -> Array:
            sharding = NamedSharding(mesh, spec_for(path, leaf.shape, rules, mesh))
            place = table[path]
            names, lead = list(_tensor_names(path, place, config).values()), _stacked(path, place, config)
            if names[0] not in tensors:
                new = jax.jit(lambda: init_variables(config, jax.random.key(0))["score"]["weight"])
                return jax.device_put(new(), sharding)
            turned = range(len(leaf.shape) - len(lead))[::-1] if place.transposed else None
            how = {
                "axes": turned and tuple(turned),
                "columns": None if place.part is None else place.part.places,
            }
            if lead:
                found = [tensors[name] for name in names]
                return read_stack(found, lead, leaf.shape, leaf.dtype, sharding, **how)
            return read_tensor(tensors[names[0]], leaf.shape, leaf.dtype, sharding, **how)

        def kept(path: str, leaf: jax.ShapeDtypeStruct) -> PyTree:
            if kernels is None or not path.endswith("/kernel"):
                return read(path, leaf)
            return jax.block_until_ready(_quantized(read(path, leaf), kernels))

        return config, map_named(kept, abstract)


_quantized = jax.jit(quantize, static_argnums=1)


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
    name = np.dtype(dtype or config.param_dtype).name
    write_tensors(
        folder,
        checkpoint_tensors(config, variables, dtype),
        max_shard_bytes=max_shard_bytes,
        beside=lambda: _write_configs(folder, config, before, source, name),
    )


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
        for index, name in _tensor_names(first, table[first], config).items():
            parts = {path: on_host(x[index] if index else x) for path, x in leaves.items()}
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
