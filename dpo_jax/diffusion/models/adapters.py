"""Adapters of diffusion models in diffusers' files, both ways; PEFT's folders and older spellings are read too.

https://github.com/huggingface/diffusers: `pytorch_lora_weights.safetensors` holds `unet.MODULE.lora_A.weight` [r, in]
and `unet.MODULE.lora_B.weight` [out, r], where here A is [in, r] and B [r, out] (`dpo_jax.lora`), with the layer's axis
in front where layers are stacked. A scale is not stored: programs that read nothing but the tensors take 1, so files
are written with the scale inside B, and everyone computes the same.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.diffusion.models.table import LINEAR, Place, Table, tensor_names, tensor_shape
from dpo_jax.keys import WeightsError, read_object
from dpo_jax.lora import MAGNITUDE, SCALE, A, B, adapter_sites, scale_divisor
from dpo_jax.peft import ALPHA, CONFIG_FILE, ENDS, PREFIX, WEIGHTS_FILE, check_options, read_tensors
from dpo_jax.tree import named_leaves
from dpo_jax.types import PyTree
from dpo_jax.weights import on_host

FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # key of the file's metadata under which diffusers keeps PEFT's config
_KOHYA = "lora_"  # `lora_unet_down_blocks_0_...`
_SHOWN = 8  # names that an error lists
_KINDS = {**{end: kind for kind, end in ENDS.items()}, ".alpha": SCALE}  # how names end
# Older spellings of a tensor's name, as `re.sub` takes them.
_SPELLINGS = (
    (r"\.processor\.", "."),
    (r"\.to_out_lora\.(down|up)\.", r".to_out.0.lora.\1."),
    (r"\.to_out\.lora_", ".to_out.0.lora_"),
    (r"\.(to_q|to_k|to_v)_lora\.(down|up)\.", r".\1.lora.\2."),
    (r"\.lora(_linear_layer)?\.down\.|\.lora_down\.", ".lora_A."),
    (r"\.lora(_linear_layer)?\.up\.|\.lora_up\.", ".lora_B."),
    (r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector"),
)


class _Module(NamedTuple):
    """A linear module of the checkpoint: our path, its place in the stack of layers, and its tensor's shape."""

    path: str
    layer: int | None
    shape: tuple[int, ...]


def _modules(table: Table, variables: PyTree) -> dict[str, _Module]:
    """Name in the checkpoint -> linear module."""
    modules = {}
    for path, leaf in named_leaves(variables).items():
        place = table.get(path, Place(""))
        owner, _, kind = path.rpartition("/")
        if kind != "kernel" or place.axes != LINEAR:
            continue
        for number, name in enumerate(tensor_names(place)):
            layer = None if place.layers is None else number
            modules[name.removesuffix(".weight")] = _Module(owner, layer, tensor_shape(place, leaf))
    return modules


def load_adapter(file: str | Path, table: Table, variables: PyTree, *, prefix: str = "unet") -> PyTree:
    """Adapters of a file in diffusers' naming, or of a folder that holds one or is PEFT's.

    Args:
      file: a .safetensors file or a folder.
      table: weight table of the base.
      variables: of the base, arrays or their shapes.
      prefix: what diffusers calls the model in such a file, `unet` or `transformer`.

    Returns:
      float32, to be joined with the base by `dpo_jax.lora.with_adapters`; stacked layers that the file leaves out have
      zeros, and a rank lower than another layer's is filled up with them.

    Raises:
      WeightsError: a feature that is not supported, or tensors that do not fit the base.
    """
    path, options = _found(Path(file))
    modules = _modules(table, variables)
    tensors, metadata = read_tensors(path)
    described = _described(metadata, path)
    if options is None and described is not None:
        starts = f"{prefix}."
        inner = {key.removeprefix(starts): value for key, value in described.items() if key.startswith(starts)}
        options = _checked(inner or described, f"metadata of {path}")
    flat = {f"lora_{prefix}_{name.replace('.', '_')}": name for name in modules}
    found: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, tensor in tensors.items():
        spelled = _spelled(name)
        end = next((end for end in _KINDS if spelled.endswith(end)), None)
        module = spelled.removesuffix(end or "")
        if module.startswith(_KOHYA):
            module = flat.get(module, module)
        else:
            module = module.removeprefix(PREFIX).removeprefix(f"{prefix}.")
        if end is None or module not in modules:
            unknown.append(name)
        else:
            found.setdefault(module, {})[_KINDS[end]] = tensor
    if unknown or not found:
        names = ", ".join(sorted(unknown)[:_SHOWN]) or "none"
        raise WeightsError(f"{path}: tensors that are no adapters of this model's linear layers: {names}")
    sites = {name: _site(name, parts, modules[name].shape, options, path) for name, parts in found.items()}
    return _tree(sites, modules, table, path)


def _spelled(name: str) -> str:
    for pattern, by in _SPELLINGS:
        name = re.sub(pattern, by, name)
    return name


def _found(file: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file of tensors, and PEFT's config if it stands beside it."""
    if not file.is_dir():
        return file, None
    if (file / FILE).exists():
        return file / FILE, None
    place = file / CONFIG_FILE
    if not place.exists() or not (file / WEIGHTS_FILE).exists():
        raise WeightsError(f"{file}: no {FILE}, and no {CONFIG_FILE} with {WEIGHTS_FILE}")
    return file / WEIGHTS_FILE, _checked(read_object(place), str(place))


def _described(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The config in a file's metadata, if there is one."""
    if _METADATA not in metadata:
        return None
    try:
        return dict(json.loads(metadata[_METADATA]))
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path}: {_METADATA} is no JSON object ({error})") from error


def _checked(options: dict[str, Any], place: str) -> dict[str, Any]:
    """PEFT's config, if everything in it is supported; one that names no kind is LoRA's."""
    # Ranks need no check: they are read off the tensors.
    check_options({"peft_type": "LORA", **options}, place, (ALPHA,))
    return options


def _site(
    name: str, parts: dict[str, np.ndarray], shape: tuple[int, ...], options: dict[str, Any] | None, path: Path
) -> dict[str, np.ndarray]:
    """The leaves of one module, from its tensors; pointwise convolutions are linear layers."""
    size_out, size_in = shape[:2]
    flat = {}
    for kind, tensor in parts.items():
        if kind in (MAGNITUDE, SCALE):
            flat[kind] = tensor.reshape(-1)
        else:  # a window of more than one place stays, and does not fit
            flat[kind] = tensor.reshape(tensor.shape[:2]) if set(tensor.shape[2:]) == {1} else tensor
    rank = flat[A].shape[0] if A in flat else 0
    expected = {A: (rank, size_in), B: (size_out, rank), MAGNITUDE: (size_out,), SCALE: (1,)}
    if not rank or B not in flat or any(flat[kind].shape != expected[kind] for kind in flat):
        shown = ", ".join(f"{kind} {list(tensor.shape)}" for kind, tensor in parts.items())
        raise WeightsError(f"{path}: {name} has {shown}; expected lora_a [r, {size_in}] and lora_b [{size_out}, r]")
    alpha, divisor = float(rank), float(rank)
    if SCALE in flat:
        alpha = float(flat[SCALE][0])
    elif options is not None:
        alpha = ALPHA.of(options, name)
        divisor = scale_divisor(rank, bool(options.get("use_rslora")))
    site = {A: flat[A].T, B: flat[B].T, SCALE: np.float32(alpha / divisor)}
    return site | ({MAGNITUDE: flat[MAGNITUDE]} if MAGNITUDE in flat else {})


def _tree(
    sites: Mapping[str, dict[str, np.ndarray]], modules: Mapping[str, _Module], table: Table, path: Path
) -> PyTree:
    """Adapters from the leaves of each module; layers that our variables stack are put together."""
    adapters: dict = {}
    by_path: dict[str, dict[int | None, dict[str, np.ndarray]]] = {}
    for name, site in sites.items():
        by_path.setdefault(modules[name].path, {})[modules[name].layer] = site
    for owner, layers in by_path.items():
        place = table[f"{owner}/kernel"]
        if place.layers is None:
            leaves = layers[None]
        else:
            leaves = _stacked([layers.get(number) for number in range(len(place.layers))], f"{path}: {owner}")
        *above, last = owner.split("/")
        inner = adapters
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = {kind: jnp.asarray(leaf) for kind, leaf in leaves.items()}
    return adapters


def _stacked(layers: list[dict[str, np.ndarray] | None], place: str) -> dict[str, np.ndarray]:
    present = [site for site in layers if site is not None]
    rank, kinds = max(site[A].shape[1] for site in present), {frozenset(site) for site in present}
    if len(kinds) > 1 or (MAGNITUDE in present[0] and len(present) < len(layers)):
        raise WeightsError(f"{place}: DoRA in some of {len(layers)} layers; expected all or none")
    size_in, size_out = present[0][A].shape[0], present[0][B].shape[1]
    a = np.zeros((len(layers), size_in, rank), np.float32)
    b = np.zeros((len(layers), rank, size_out), np.float32)
    scale = np.ones(len(layers), np.float32)
    for number, site in enumerate(layers):
        if site is not None:
            own = site[A].shape[1]
            a[number, :, :own], b[number, :own], scale[number] = site[A], site[B], site[SCALE]
    stacked = {A: a, B: b, SCALE: scale}
    return stacked | ({MAGNITUDE: np.stack([site[MAGNITUDE] for site in present])} if MAGNITUDE in present[0] else {})


def save_adapter(
    folder: str | Path, table: Table, variables: PyTree, adapters: PyTree, *, prefix: str = "unet"
) -> None:
    """Write FILE so that diffusers' `load_lora_weights` and `load_lora_adapter` read it; process 0 writes.

    Args:
      folder, table, variables, prefix: as in `load_adapter`.

    Raises:
      WeightsError: adapters of what is no linear layer of the checkpoint.
    """
    tensors, ranks, dora = {}, {}, []
    sites, modules = adapter_sites(adapters), _modules(table, variables)
    if unknown := sites.keys() - {module.path for module in modules.values()}:
        raise WeightsError(f"{', '.join(sorted(unknown)[:_SHOWN])}: no linear layer of this model")
    whole = {owner: {kind: on_host(leaf) for kind, leaf in site.items()} for owner, site in sites.items()}
    for name, module in modules.items():
        if module.path not in whole:
            continue
        leaves = whole[module.path]
        site = leaves if module.layer is None else {kind: leaf[module.layer] for kind, leaf in leaves.items()}
        ones = (1,) * (len(module.shape) - 2)
        b = site[B].astype(np.float32) * site[SCALE].astype(np.float32)
        for kind, tensor in {A: site[A].T, B: b.T}.items():
            tensors[f"{prefix}.{name}{ENDS[kind]}"] = tensor.astype(np.float32).reshape(tensor.shape + ones).copy()
        if MAGNITUDE in site:
            magnitude = site[MAGNITUDE].astype(np.float32)
            tensors[f"{prefix}.{name}{ENDS[MAGNITUDE]}"] = magnitude.reshape((1, -1, *ones) if ones else (-1,))
        ranks[name] = site[A].shape[-1]
        dora.append(MAGNITUDE in site)
    if not ranks or len(set(dora)) != 1:
        raise WeightsError(f"adapters of {len(ranks)} layers, {sum(dora)} of them DoRA; diffusers has all or none")
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    options = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": dora[0],
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if jax.process_index() == 0:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        packed = json.dumps({f"{prefix}.{key}": value for key, value in options.items()}, indent=1)
        save_file(tensors, folder / f"{FILE}.partial", metadata={"format": "pt", _METADATA: packed})
        (folder / f"{FILE}.partial").replace(folder / FILE)
