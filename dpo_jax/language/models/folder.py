"""A Hugging Face folder apart from its tensors: config.json in and out, tokenizer, hub ids."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpo_jax.language.models.decoder import DecoderConfig, RopeConfig

# Architecture -> whether it is a reward model.
ARCHITECTURES = {"LlamaForCausalLM": False, "LlamaForSequenceClassification": True}


class WeightsError(ValueError):
    """A checkpoint that cannot be read as asked; the message names the folder and every tensor or key concerned."""


def config_from_hf(config: Mapping[str, Any], *, place: str = "config.json") -> DecoderConfig:
    """Decoder config of a checkpoint's config.json, in the layout of transformers 4 or 5.

    Raises:
      WeightsError: an architecture or a feature that the decoder does not have, or a key that is missing or wrong.
    """
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    known = [name for name in names if isinstance(name, str) and name in ARCHITECTURES]
    if not known:
        raise WeightsError(f"{place}: architecture {names or 'not given'}; there is {', '.join(ARCHITECTURES)}")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in keys if config.get(key) is None]:
        raise WeightsError(f"{place}: the keys {', '.join(missing)} are missing")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise WeightsError(f"{place}: hidden_act is {activation!r}; Llama models have 'silu'")
    integer, flag = partial(_integer, config, place), partial(_flag, config, place)
    hidden_size, heads = integer("hidden_size"), integer("num_attention_heads")
    if config.get("head_dim") is None and hidden_size % heads:
        raise WeightsError(f"{place}: num_attention_heads is {heads}; hidden_size {hidden_size} is no multiple of it")
    head_dim, key_value_heads = integer("head_dim", hidden_size // heads), integer("num_key_value_heads", heads)
    if head_dim % 2:
        raise WeightsError(f"{place}: head_dim is {head_dim}; rotary positions need an even one")
    if heads % key_value_heads:
        raise WeightsError(
            f"{place}: num_key_value_heads is {key_value_heads}; num_attention_heads {heads} is no multiple of it"
        )
    return DecoderConfig(
        vocabulary_size=integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer("intermediate_size"),
        layers=integer("num_hidden_layers"),
        heads=heads,
        key_value_heads=key_value_heads,
        head_dim=head_dim,
        norm_epsilon=_number(config, place, "rms_norm_eps", 1e-6),
        rope=_rope_from_hf(config, place),
        tie_embeddings=flag("tie_word_embeddings", False),
        reward=_is_reward(config, place, known[0]),
        attention_bias=flag("attention_bias", False),
        mlp_bias=flag("mlp_bias", False),
        initializer_range=_number(config, place, "initializer_range", 0.02),
    )


def _is_reward(config: Mapping[str, Any], place: str, architecture: str) -> bool:
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if ARCHITECTURES[architecture] and count != 1:
        raise WeightsError(f"{place}: {architecture} with {count} labels; a reward model has one")
    return ARCHITECTURES[architecture]


def _integer(config: Mapping[str, Any], place: str, key: str, default: int | None = None) -> int:
    """An integer from 1 on; a key that is missing or null takes the default."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise WeightsError(f"{place}: {key} is {value!r}; expected an integer from 1 to 2^31 - 1")
    return value


def _number(
    config: Mapping[str, Any], place: str, key: str, default: float | None = None, *, above: float = 0.0
) -> float:
    """A number above the bound; a key that is missing or null takes the default."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e30:
        raise WeightsError(f"{place}: {key} is {value!r}; expected a number above {above:g}")
    return float(value)


def _flag(config: Mapping[str, Any], place: str, key: str, default: bool) -> bool:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise WeightsError(f"{place}: {key} is {value!r}; expected true or false")
    return value


def _rope_from_hf(config: Mapping[str, Any], place: str) -> RopeConfig:
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            raise WeightsError(f"{place}: {key} is {config[key]!r}; expected an object")
        given |= config.get(key) or {}
    number = partial(_number, given, place)
    kind = given.get("rope_type") or given.get("type") or "default"
    # The base stands in rope_parameters since transformers 5, beside it before; 10000 is the class's own default.
    theta = number("rope_theta", _number(config, place, "rope_theta", 10000.0, above=1.0), above=1.0)
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
        raise WeightsError(f"{place}: partial_rotary_factor is not 1; partial rotation is not supported")
    if kind == "default":
        return RopeConfig(theta)
    needed: dict[str, tuple[str, ...]] = {"linear": ("factor",), "yarn": ("factor",)}
    needed["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if not isinstance(kind, str) or kind not in needed:
        raise WeightsError(f"{place}: rope type {kind!r}; there are default, {', '.join(needed)}")
    if missing := [key for key in needed[kind] if given.get(key) is None]:
        raise WeightsError(f"{place}: rope type {kind!r} without {', '.join(missing)}")
    factor = number("factor")
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    key = "original_max_position_embeddings"
    if given.get(key) is None and config.get("max_position_embeddings") is None:
        raise WeightsError(f"{place}: rope type {kind!r} without {key}")
    original = _integer(given, place, key, config.get("max_position_embeddings"))
    if kind == "llama3":
        low = number("low_freq_factor")
        return RopeConfig(theta, "llama3", factor, original, low, number("high_freq_factor", above=low))
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(given, factor, place),
        truncate=_flag(given, place, "truncate", True),
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float, place: str) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("attention_factor") is not None:
        return _number(given, place, "attention_factor")
    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(_number(given, place, "mscale")) / scale(_number(given, place, "mscale_all_dim"))
    return scale(1.0)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config; both layouts of the rotary settings, so that any transformers reads them."""
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope.original_length
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_frequency_factor
        rope["high_freq_factor"] = config.rope.high_frequency_factor
    if config.rope.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        rope |= {name: getattr(config.rope, name) for name in names}
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if config.reward else {}
    return {
        "architectures": [next(name for name, reward in ARCHITECTURES.items() if reward == config.reward)],
        **labels,
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "initializer_range": config.initializer_range,
    }


def local_folder(model: str | Path) -> Path:
    """The folder itself, or a hub id's files (safetensors, configs, tokenizer) in the hub's cache.

    Raises:
      WeightsError: neither a folder nor a hub id that can be had.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
        )
    except Exception as error:  # offline, no such id, no permission: the hub has many names for it
        raise WeightsError(f"{model} is neither a folder here nor a model that the hub gives ({error})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
      WeightsError: there is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / 'config.json'}: expected an object")
    return config


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
      WeightsError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise WeightsError(f"{folder}: no tokenizer can be read ({error})") from error
