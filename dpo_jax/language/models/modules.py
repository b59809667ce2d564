"""The linear modules of a checkpoint, and adapters of modules that hold several of our kernels.

A fused module (query, key and value in one) has one A [r, in] and one B [out, r]. Read, each of our kernels gets that A
and its own columns of B. Written, kernels with factors of their own are put side by side along the rank,

    x [A_q A_k A_v] diag(B_q, B_k, B_v) = [x A_q B_q, x A_k B_k, x A_v B_v]

so both ways are exact. DoRA's norms are those of single outputs, so they come apart and together in the same way.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.decoder import abstract_variables
from dpo_jax.language.models.families.table import Part
from dpo_jax.language.models.weights import weight_table
from dpo_jax.lora import MAGNITUDE, SCALE, A, B
from dpo_jax.tree import named_leaves

Site = Mapping[str, np.ndarray]


class Module(NamedTuple):
    """A linear module of the checkpoint, in all layers.

    Attributes:
      name: in the checkpoint; `{layer}` stands for the number of the layer.
      shape: (in, out).
      parts: path name of our layer -> its part of the outputs, None if it is the whole module.
      transposed: whether the checkpoint keeps the kernel as [out, in].
    """

    name: str
    shape: tuple[int, int]
    parts: Mapping[str, Part | None]
    transposed: bool


def linear_modules(config: DecoderConfig) -> list[Module]:
    """Modules whose kernels can have adapters: one matrix in each layer."""
    table = weight_table(config)
    found: dict[str, dict[str, tuple[Part | None, tuple[int, ...], bool]]] = {}
    for name, leaf in named_leaves(abstract_variables(config)).items():
        path, _, kind = name.rpartition("/")
        if kind == "kernel" and leaf.ndim == 3:
            place = table[name]
            module = place.name.removesuffix(".weight")
            found.setdefault(module, {})[path] = place.part, leaf.shape[1:], place.transposed
    modules = []
    for module, members in found.items():
        part, (size_in, size_out), transposed = next(iter(members.values()))
        size_out = size_out if part is None else part.whole * part.groups
        parts = {path: part for path, (part, _, _) in members.items()}
        modules.append(Module(module, (size_in, size_out), parts, transposed))
    return modules


def split_site(module: Module, site: Site) -> dict[str, dict[str, np.ndarray]]:
    """The adapter of a module as those of our kernels.

    Args:
      site: `lora_a` [layers, in, r], `lora_b` [layers, r, out], `lora_scale` [layers], with DoRA `lora_magnitude`.
    """
    return {path: _columns(module, part, site) for path, part in module.parts.items()}


def _columns(module: Module, part: Part | None, site: Site) -> dict[str, np.ndarray]:
    if part is None:
        return dict(site)
    places = _places(part)
    return {kind: leaf[..., places] if kind in (B, MAGNITUDE) else leaf for kind, leaf in site.items()}


def _places(part: Part) -> np.ndarray:
    return part.places(np.arange(part.size * part.groups))


def join_sites(module: Module, sites: Mapping[str, Site]) -> dict[str, np.ndarray]:
    """The adapter of a module from those of our kernels in it, which need not all have one (with DoRA they must).

    Kernels that share A and scale, as `split_site` makes them, share the rank; others have ranks side by side. Scales
    that differ are multiplied into B.
    """
    first, *others = sites.values()
    if module.parts[next(iter(sites))] is None:
        return dict(first)
    same_scale = all(np.array_equal(site[SCALE], first[SCALE]) for site in others)
    shared = same_scale and all(np.array_equal(site[A], first[A]) for site in others)
    rank = first[A].shape[-1] if shared else sum(site[A].shape[-1] for site in sites.values())
    layers, size_out = first[A].shape[0], module.shape[1]
    b, magnitude, start = (
        np.zeros((layers, rank, size_out), first[B].dtype),
        np.zeros((layers, size_out), np.float32),
        0,
    )
    for path, site in sites.items():
        part = module.parts[path]
        assert part is not None
        own, places = site[A].shape[-1], _places(part)
        values = site[B] if same_scale else site[B] * site[SCALE][:, None, None]
        b[:, start : start + own, places] = values
        start += 0 if shared else own
        if MAGNITUDE in site:
            magnitude[:, places] = site[MAGNITUDE]
    joined = {
        A: first[A] if shared else np.concatenate([site[A] for site in sites.values()], axis=-1),
        B: b,
        SCALE: first[SCALE] if same_scale else np.ones_like(first[SCALE]),
    }
    return joined | ({MAGNITUDE: magnitude} if MAGNITUDE in first else {})
