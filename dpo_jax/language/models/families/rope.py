"""Rotary settings of config.json, in the layouts of transformers 4 and 5, in and out."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from dpo_jax.language.models.families.keys import WeightsError, flag, integer, number
from dpo_jax.language.models.rope import RopeConfig


def rope_settings(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) over `rope_scaling` (before)."""
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            raise WeightsError(f"{place}: {key} is {config[key]!r}; expected an object")
        given |= config.get(key) or {}
    return given


def rope_from_hf(config: Mapping[str, Any], place: str, *, theta_key: str = "rope_theta") -> RopeConfig:
    """Rotary settings of a checkpoint in which whole heads are rotated.

    Raises:
      WeightsError: a kind that the decoder does not have, a key that is missing or wrong, or partial rotation.
    """
    given = rope_settings(config, place)
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise WeightsError(f"{place}: partial_rotary_factor is not 1; partial rotation is not supported")
    return read_rope(given, config, place, theta_key=theta_key)


def rotary_dim(
    config: Mapping[str, Any], place: str, head_dim: int, default: float, *, key: str = "partial_rotary_factor"
) -> int | None:
    """How many dimensions of a head are rotated, None for all of them."""
    given = rope_settings(config, place)
    settings = given if given.get("partial_rotary_factor") is not None else {"partial_rotary_factor": config.get(key)}
    factor = number(settings, place, "partial_rotary_factor", default)
    turned = int(head_dim * factor)
    if factor > 1 or turned < 2 or turned % 2:
        raise WeightsError(f"{place}: {key} is {factor:g}; it must leave an even part of head_dim {head_dim}")
    return None if turned == head_dim else turned


def rotary_factor(turned: int | None, head_dim: int) -> float:
    """The fraction of a head that is rotated, such that `int(head_dim * factor)` is exact."""
    factor = 1.0 if turned is None else turned / head_dim
    return factor if turned is None or int(head_dim * factor) == turned else math.nextafter(factor, 1)


def read_rope(
    given: Mapping[str, Any],
    config: Mapping[str, Any],
    place: str,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
) -> RopeConfig:
    """Rotary settings from their own object and from what stands beside it.

    Args:
      given: as `rope_parameters`.
      config: config.json.
      theta: base where neither gives one, the default of the family's class.
      theta_key: name of the base in config.json.
    """
    read = partial(number, given, place)
    kind = given.get("rope_type") or given.get("type") or "default"
    # The base stands in rope_parameters since transformers 5, beside it before.
    theta = read("rope_theta", number(config, place, theta_key, theta, above=1.0), above=1.0)
    if kind == "default":
        return RopeConfig(theta)
    needed: dict[str, tuple[str, ...]] = {"linear": ("factor",), "yarn": ("factor",)}
    needed["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if not isinstance(kind, str) or kind not in needed:
        raise WeightsError(f"{place}: rope type {kind!r}; there are default, {', '.join(needed)}")
    if missing := [key for key in needed[kind] if given.get(key) is None]:
        raise WeightsError(f"{place}: rope type {kind!r} without {', '.join(missing)}")
    factor = read("factor")
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    key = "original_max_position_embeddings"
    if given.get(key) is None and config.get("max_position_embeddings") is None:
        raise WeightsError(f"{place}: rope type {kind!r} without {key}")
    original = integer(given, place, key, config.get("max_position_embeddings"))
    if kind == "llama3":
        low = read("low_freq_factor")
        return RopeConfig(theta, "llama3", factor, original, low, read("high_freq_factor", above=low))
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=read("beta_fast", 32.0),
        beta_slow=read("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(given, factor, place),
        truncate=flag(given, place, "truncate", True),
    )


def read_longrope(
    given: Mapping[str, Any], config: Mapping[str, Any], place: str, *, turned: int, original: int
) -> RopeConfig:
    """Rotary settings with factors for short and for long sequences.

    Args:
      given: as `rope_parameters`.
      config: config.json.
      turned: number of dimensions of a head that are rotated.
      original: context of the training before scaling.

    Raises:
      WeightsError: factors that are missing, no numbers above 0, or not one for each pair of dimensions.
    """
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = given.get(key)
        if not isinstance(values, list) or len(values) != turned // 2:
            raise WeightsError(f"{place}: {key} is {values!r}; expected {turned // 2} numbers above 0")
        numbers = {f"{key}[{i}]": value for i, value in enumerate(values)}
        factors[key] = tuple(number(numbers, place, name) for name in numbers)
    longest = integer(config, place, "max_position_embeddings", original)
    factor = number(given, place, "factor", longest / original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        number(given, place, "rope_theta", number(config, place, "rope_theta", 10000.0, above=1.0), above=1.0),
        "longrope",
        factor,
        original,
        attention_factor=number(given, place, "attention_factor", scale),
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float, place: str) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return number(given, place, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(number(given, place, "mscale")) / scale(number(given, place, "mscale_all_dim"))
    return scale(1.0)


def rope_parameters(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    written: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        written["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        written["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        written["low_freq_factor"] = rope.low_frequency_factor
        written["high_freq_factor"] = rope.high_frequency_factor
    if rope.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        written |= {name: getattr(rope, name) for name in names}
    if rope.kind == "longrope":
        written |= {"attention_factor": rope.attention_factor}
        written |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    return written
