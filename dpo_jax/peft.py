"""Adapters in PEFT's folders, as far as no model is concerned: what their config may say, and their tensors as stored.

https://github.com/huggingface/peft: `adapter_config.json` beside `adapter_model.safetensors`. A scale is not stored
there: it follows from alpha and rank, which patterns may set module by module.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from dpo_jax.keys import WeightsError
from dpo_jax.lora import MAGNITUDE, A, B
from dpo_jax.weights import DTYPES

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor's name
ENDS = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}
_SHOWN = 8  # names that an error lists
# Starts that leave the base as it is; the others subtract something from it.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
# Keys that are read by name, or that say nothing about what a trained adapter computes.
_UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("use_rslora", "use_dora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"),
}
_LEARNED = "modules_to_save"  # modules that were trained whole


class Setting(NamedTuple):
    """A number that one key sets for all modules, and another by patterns of their names."""

    key: str
    pattern_key: str

    def of(self, options: Mapping[str, Any], module: str) -> Any:
        """The value of the first pattern that matches the module's name, or else the value for all."""
        patterns = options.get(self.pattern_key) or {}
        return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), options[self.key])


RANK, ALPHA = Setting("r", "rank_pattern"), Setting("lora_alpha", "alpha_pattern")


def check_options(
    options: Mapping[str, Any], place: str, settings: Collection[Setting], *, learned: Collection[str] = ()
) -> None:
    """Refuse a config that asks for more than low-rank adapters of linear layers.

    Args:
      options: what adapter_config.json holds.
      place: of the config, for errors.
      settings: that the caller reads.
      learned: modules that may have been trained whole.

    Raises:
      WeightsError: a feature that is not supported, or a setting that is no number above 0.
    """
    if options.get("peft_type") != "LORA":
        raise WeightsError(f"{place}: expected an object whose peft_type is 'LORA'")
    active = {k: v for k, v in options.items() if v not in (None, False, "", "none") and v not in ({}, [])}
    refused = {key: value for key, value in active.items() if key not in _UNDERSTOOD}
    whole = refused.get(_LEARNED)
    if isinstance(whole, list) and all(name in learned for name in whole):
        del refused[_LEARNED]
    if options.get("init_lora_weights") not in _STARTS:
        refused["init_lora_weights"] = options["init_lora_weights"]
    if refused:
        listed = ", ".join(f"{key} {value!r}" for key, value in refused.items())
        raise WeightsError(f"{place}: not supported: {listed}; merge this adapter into its base with peft")
    numbers = {setting.key: options.get(setting.key) for setting in settings}
    for _, key in settings:
        patterns = options.get(key) or {}
        if not isinstance(patterns, dict):
            raise WeightsError(f"{place}: {key} is {patterns!r}; expected an object")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise WeightsError(f"{place}: {key} has {pattern!r}, no regular expression: {error}") from error
        numbers |= {f"{key} of {pattern!r}": value for pattern, value in patterns.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise WeightsError(f"{place}: {key} is {value!r}; expected a number above 0")


class StoredTensors(NamedTuple):
    """What a file of adapters holds: tensors by name, float32, and the strings beside them."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_tensors(file: Path) -> StoredTensors:
    """All of a file of safetensors.

    Raises:
      WeightsError: there is no such file, or a tensor has a type that adapters do not have.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            odd = [f"{name} ({kind})" for name, kind in types.items() if kind not in DTYPES]
            tensors = {} if odd else {name: opened.get_tensor(name).astype(np.float32) for name in types}
            metadata = opened.metadata() or {}
    except Exception as error:  # safetensors raises a type of its own
        raise WeightsError(f"{file}: not a safetensors file ({error})") from error
    if odd:
        raise WeightsError(f"{file}: tensors of unknown type: {', '.join(odd[:_SHOWN])}; expected {', '.join(DTYPES)}")
    return StoredTensors(tensors, metadata)
