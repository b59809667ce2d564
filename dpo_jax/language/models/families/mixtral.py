"""Mixtral: Mistral with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import Architecture, integer, optional, refuse, sizes
from dpo_jax.language.models.families.rope import read_rope, rope_settings
from dpo_jax.language.models.families.table import Table, experts

ARCHITECTURES = {
    "MixtralForCausalLM": Architecture("mixtral"),
    "MixtralForSequenceClassification": Architecture("mixtral", reward=True),
}
PREFIX = llama.PREFIX


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    refuse(config, place, {"attention_bias": False, "partial_rotary_factor": 1.0, "router_jitter_noise": 0.0})
    return DecoderConfig(
        **sizes(config, place, key_value_heads=8),
        **llama.common_from_hf(config, place, norm_epsilon=1e-5),
        family=architecture.family,
        reward=architecture.reward,
        rope=read_rope(rope_settings(config, place), config, place, theta=1e6),
        window=optional(integer, config, place, "sliding_window", None),
        experts=integer(config, place, "num_local_experts", 8),
        experts_per_token=integer(config, place, "num_experts_per_tok", 2),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return llama.common_to_hf(config, ARCHITECTURES) | {
        "sliding_window": config.window,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
    }


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    block = "model.layers.{layer}.block_sparse_moe."
    one = f"{block}experts.{{expert}}."
    return {**llama.table(config), **experts(f"{block}gate", gate=f"{one}w1", up=f"{one}w3", down=f"{one}w2")}
