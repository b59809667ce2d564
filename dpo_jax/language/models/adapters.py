"""Adapters of decoders in PEFT's folders (`dpo_jax.peft`), both ways.

PEFT's A is [r, in] and its B [out, r], one of each for every layer; here A is [layers, in, r] and B [layers, r, out]
(`dpo_jax.lora`). A module that holds several of our kernels has one adapter there (`modules`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dpo_jax.keys import WeightsError, read_object
from dpo_jax.language.models.decoder import DecoderConfig, abstract_variables
from dpo_jax.language.models.modules import Module, join_sites, linear_modules, split_site
from dpo_jax.language.models.weights import weight_table
from dpo_jax.lora import MAGNITUDE, SCALE, A, B, adapter_sites, scale_divisor, with_adapters
from dpo_jax.peft import ALPHA, CONFIG_FILE, ENDS, PREFIX, RANK, WEIGHTS_FILE, check_options, read_tensors
from dpo_jax.tree import named_leaves
from dpo_jax.types import PyTree
from dpo_jax.weights import on_host

_SCORE = "score/weight"
_SHOWN = 8  # names that an error lists


class LoadedAdapter(NamedTuple):
    """What a folder holds.

    Attributes:
      adapters: to be joined with the base by `dpo_jax.lora.with_adapters`; float32. Layers that the folder leaves out
        have factors of zeros, and a rank that is lower than another layer's is filled up with zeros.
      learned: other variables that were trained whole (a reward model's head), or an empty dict.
      rslora: how alpha and scale belong together.
      base: the base's name, or None.
    """

    adapters: PyTree
    learned: PyTree
    rslora: bool
    base: str | None


def check_names(config: DecoderConfig, adapters: PyTree) -> None:
    """Raise WeightsError if an adapter is one that PEFT's format has no place for."""
    sites = adapter_sites(adapters)
    modules = linear_modules(config)
    if unknown := sites.keys() - {path for module in modules for path in module.parts}:
        raise WeightsError(
            f"{', '.join(sorted(unknown))}: no linear modules of the checkpoint, so PEFT has no names for them; "
            "choose other targets"
        )
    for module in modules:
        have = [path for path in module.parts if path in sites]
        bare = [path for path in module.parts if path not in sites]
        if have and bare and any(MAGNITUDE in sites[path] for path in have):
            raise WeightsError(
                f"the checkpoint keeps {', '.join(module.parts)} in one module, whose outputs DoRA norms all; "
                f"adapt {', '.join(bare)} too, or none of them"
            )


def _by_name(config: DecoderConfig) -> dict[str, tuple[Module, int]]:
    """Name in the checkpoint -> module and number of the layer."""
    return {
        module.name.format(layer=layer): (module, layer)
        for module in linear_modules(config)
        for layer in range(config.layers)
    }


def load_adapter(folder: str | Path, config: DecoderConfig) -> LoadedAdapter:
    """Read a PEFT folder; a `lora_dropout` in it concerned its training and is not read.

    Args:
      config: of the base.

    Raises:
      WeightsError: a feature that is not supported, or tensors that do not fit the base or the folder's own config.
    """
    folder = Path(folder)
    options = _read_options(folder, config)
    tensors = _read_tensors(folder)
    modules = _by_name(config)
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    learned, unknown = {}, []
    for name, tensor in tensors.items():
        kind = next((kind for kind, end in ENDS.items() if name.endswith(end)), None)
        module = name.removeprefix(PREFIX).removesuffix(ENDS.get(kind or "", ""))
        if config.reward and name.removeprefix(PREFIX) == weight_table(config)[_SCORE].name:
            learned = {"score": {"weight": jnp.asarray(tensor)}}
        elif kind is None or module not in modules or not name.startswith(PREFIX):
            unknown.append(name)
        else:
            owner, layer = modules[module]
            found.setdefault(owner.name, {}).setdefault(layer, {})[kind] = tensor
    if unknown or not found:
        names = ", ".join(sorted(unknown)[:_SHOWN]) or "none"
        raise WeightsError(f"{folder}: tensors that are no adapters of this model's linear layers: {names}")
    adapters: dict = {}
    for module in linear_modules(config):
        if module.name in found:
            whole = _stacked(folder, found[module.name], module, config.layers, options)
            for path, site in split_site(module, whole).items():
                leaves: Any = {kind: jnp.asarray(leaf) for kind, leaf in site.items()}
                for part in reversed(path.split("/")):
                    leaves = {part: leaves}
                adapters = with_adapters(adapters, leaves)
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract_variables(config)).items()}
    if learned and learned["score"]["weight"].shape != shapes[_SCORE]:
        raise WeightsError(f"{folder}: the head is {learned['score']['weight'].shape}, expected {shapes[_SCORE]}")
    return LoadedAdapter(adapters, learned, bool(options.get("use_rslora")), options.get("base_model_name_or_path"))


def _read_options(folder: Path, config: DecoderConfig) -> dict[str, Any]:
    """adapter_config.json, if everything in it is supported."""
    options = read_object(folder / CONFIG_FILE)
    heads = ("score", "classifier") if config.reward else ()  # PEFT names both, and the model has one
    check_options(options, str(folder / CONFIG_FILE), (RANK, ALPHA), learned=heads)
    return options


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    path = folder / WEIGHTS_FILE
    if not path.exists():
        hint = "; convert adapter_model.bin, which would run code when read" if any(folder.glob("*.bin")) else ""
        raise WeightsError(f"{folder}: no {WEIGHTS_FILE}{hint}")
    return read_tensors(path).tensors


def _stacked(
    folder: Path,
    layers: dict[int, dict[str, np.ndarray]],
    module: Module,
    count: int,
    options: dict[str, Any],
) -> dict[str, np.ndarray]:
    """The leaves of one module in all layers, from the tensors of its layers."""
    size_in, size_out = module.shape
    modules = {layer: module.name.format(layer=layer) for layer in range(count)}
    dora, rslora = bool(options.get("use_dora")), bool(options.get("use_rslora"))
    ranks = {layer: int(RANK.of(options, name)) for layer, name in modules.items()}
    alphas = {layer: ALPHA.of(options, name) for layer, name in modules.items()}
    wrong = []
    for layer, tensors in layers.items():
        expected = {A: (ranks[layer], size_in), B: (size_out, ranks[layer])}
        expected |= {MAGNITUDE: (size_out,)} if dora else {}
        have = {kind: tensor.shape for kind, tensor in tensors.items()}
        if have != expected:
            wrong.append(f"{modules[layer]} has {_shown(have)}, expected {_shown(expected)}")
    if dora and len(layers) < count:
        wrong.append(f"DoRA in {len(layers)} of {count} layers of {modules[0]}; expected all")
    if wrong:
        raise WeightsError(f"{folder}: {'; '.join(wrong[:_SHOWN])}")
    rank = max(ranks[layer] for layer in layers)
    a, b = np.zeros((count, size_in, rank), np.float32), np.zeros((count, rank, size_out), np.float32)
    for layer, tensors in layers.items():
        a[layer, :, : ranks[layer]], b[layer, : ranks[layer]] = tensors[A].T, tensors[B].T
    scale = np.array([alphas[layer] / scale_divisor(ranks[layer], rslora) for layer in modules], np.float32)
    site = {A: a, B: b, SCALE: scale}
    if dora:
        site[MAGNITUDE] = np.stack([layers[layer][MAGNITUDE] for layer in modules])
    return site


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{kind} {list(shape)}" for kind, shape in shapes.items()) or "nothing"


def save_adapter(
    folder: str | Path,
    config: DecoderConfig,
    adapters: PyTree,
    *,
    learned: PyTree = None,
    rslora: bool = False,
    base: str | None = None,
) -> None:
    """Write a folder that PEFT loads; process 0 writes, the others help to gather.

    Layers whose factors are both zero beside others that are not are left out: they were never adapted. Where the
    checkpoint keeps several of our kernels in one module, the rank there is the sum of theirs, unless they share A.

    Args:
      config: of the base.
      learned: other variables that were trained whole: a reward model's head, or nothing.
      rslora: write scales as alpha / sqrt(r).
      base: name of the base.

    Raises:
      WeightsError: leaves that PEFT's format has no name for.
    """
    check_names(config, adapters)
    folder, sites = Path(folder), adapter_sites(adapters)
    dora = [MAGNITUDE in site for site in sites.values()]
    if len(set(dora)) != 1:
        raise WeightsError(f"adapters of {len(dora)} layers, {sum(dora)} of them DoRA; PEFT has all or none")
    tensors: dict[str, np.ndarray] = {}
    numbers: dict[str, tuple[int, float]] = {}
    for module in linear_modules(config):
        members = {path: _on_hosts(sites[path]) for path in module.parts if path in sites}
        if not members:
            continue
        whole = join_sites(module, members)
        used = [layer for layer in range(config.layers) if whole[A][layer].any() or whole[B][layer].any()]
        for layer in used or range(config.layers):
            name = module.name.format(layer=layer)
            for kind in whole.keys() & ENDS.keys():
                tensors[PREFIX + name + ENDS[kind]] = np.ascontiguousarray(whole[kind][layer].T)
            rank = whole[A].shape[-1]
            numbers[name] = rank, _alpha(whole[SCALE][layer], scale_divisor(rank, rslora))
    for name, leaf in named_leaves(learned).items():
        if name != _SCORE:
            raise WeightsError(f"{name} was trained whole; an adapter's folder holds a reward model's head only")
        head = on_host(jnp.asarray(leaf)).astype(np.float32)
        tensors[PREFIX + weight_table(config)[name].name] = np.ascontiguousarray(head)
    options = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": _targets(list(numbers), list(_by_name(config))),
        "use_rslora": rslora,
        "use_dora": dora[0],
        "modules_to_save": ["score"] if learned else None,
        "lora_dropout": 0.0,
        "bias": "none",
        # Modules of GPT-2 keep [in, out]; PEFT then turns what it merges.
        "fan_in_fan_out": not all(module.transposed for module in linear_modules(config)),
        **_numbers(numbers),
    }
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"{WEIGHTS_FILE}.partial"
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.replace(folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(options, indent=1) + "\n")


def _on_hosts(site: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {kind: on_host(jnp.asarray(leaf)) for kind, leaf in site.items()}


def _alpha(scale: np.float32, divisor: float) -> float:
    """The shortest alpha that gives this scale back exactly."""
    value = float(scale) * divisor
    for digits in range(1, 12):
        short = float(f"{value:.{digits}g}")
        if np.float32(short / divisor) == scale:
            return int(short) if short.is_integer() else short
    return value


def _end(module: str) -> str:
    """Name of a module inside its layer: what follows the layer's number."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


def _targets(adapted: list[str], modules: list[str]) -> list[str]:
    """The shortest ends of names that select the adapted modules and no others."""

    def last(module: str) -> str:
        return module.rsplit(".", 1)[-1]

    for shorten in (last, _end):
        chosen: Callable[[str], str] = shorten
        ends = {chosen(module) for module in adapted}
        if {module for module in modules if chosen(module) in ends} == set(adapted):
            return sorted(ends)
    return sorted(adapted)


def _numbers(numbers: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """r and alpha that most modules have, and patterns for the others, for all layers at once where they agree."""
    most = [Counter(values).most_common(1)[0][0] for values in zip(*numbers.values())]
    patterns: list[dict[str, Any]] = [{}, {}]
    for which, pattern in enumerate(patterns):
        by_end: dict[str, dict[str, Any]] = {}
        for module, values in numbers.items():
            by_end.setdefault(_end(module), {})[module] = values[which]
        for end, values in by_end.items():
            if len(set(values.values())) == 1:
                values = {end: next(iter(values.values()))}
            pattern |= {re.escape(name): value for name, value in values.items() if value != most[which]}
    return {"r": most[0], "lora_alpha": most[1], "rank_pattern": patterns[0], "alpha_pattern": patterns[1]}
