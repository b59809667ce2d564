"""Qwen 2, 2.5 and 3: Llama with biases in query, key and value (2, 2.5), or with norms of query and key heads (3)."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import (
    Architecture,
    flag,
    integer,
    layer_types,
    local_layers,
    optional,
    sizes,
    windows,
)
from dpo_jax.language.models.families.rope import rope_from_hf
from dpo_jax.language.models.families.table import Table

ARCHITECTURES = {
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2ForSequenceClassification": Architecture("qwen2", reward=True),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3ForSequenceClassification": Architecture("qwen3", reward=True),
}
PREFIX = llama.PREFIX


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    third = architecture.family == "qwen3"
    measures = sizes(config, place, key_value_heads=32, head_dim=128 if third else None)
    window = None
    if flag(config, place, "use_sliding_window", False):
        window = optional(integer, config, place, "sliding_window", 4096)
    # The window holds from a layer on, 28 if the key is missing.
    first = config.get("max_window_layers", 28)
    first = first if first == 0 else integer(config, place, "max_window_layers", 28)
    local = local_layers(config, place, measures["layers"], lambda layer: layer >= first)
    return DecoderConfig(
        **measures,
        **llama.common_from_hf(config, place),
        **windows(window, local),
        family=architecture.family,
        reward=architecture.reward,
        rope=rope_from_hf(config, place),
        qkv_bias=not third,
        attention_bias=third and flag(config, place, "attention_bias", False),
        query_key_norm=third,
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    written = llama.common_to_hf(config, ARCHITECTURES) | {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": layer_types(config.layers, config.window, config.local_layers),
    }
    return written | ({"attention_bias": config.attention_bias} if config.family == "qwen3" else {})


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    return llama.table(config)
