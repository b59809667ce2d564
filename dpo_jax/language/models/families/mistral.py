"""Mistral: Llama with a window in every layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import Architecture, integer, optional, refuse, sizes
from dpo_jax.language.models.families.rope import rope_from_hf
from dpo_jax.language.models.families.table import Table

ARCHITECTURES = {
    "MistralForCausalLM": Architecture("mistral"),
    "MistralForSequenceClassification": Architecture("mistral", reward=True),
}
PREFIX = llama.PREFIX


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    refuse(config, place, {"layer_types": None, "attention_bias": False})
    return DecoderConfig(
        **sizes(config, place, key_value_heads=8),
        **llama.common_from_hf(config, place),
        family=architecture.family,
        reward=architecture.reward,
        rope=rope_from_hf(config, place),
        window=optional(integer, config, place, "sliding_window", 4096),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return llama.common_to_hf(config, ARCHITECTURES) | {"sliding_window": config.window}


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    return llama.table(config)
