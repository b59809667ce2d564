"""Qwen 3 with a mixture of experts in every layer."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import Architecture, flag, integer, optional, refuse, sizes
from dpo_jax.language.models.families.rope import rope_from_hf
from dpo_jax.language.models.families.table import Table, experts

ARCHITECTURES = {
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe"),
    "Qwen3MoeForSequenceClassification": Architecture("qwen3_moe", reward=True),
}
PREFIX = llama.PREFIX


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    # The layers are stacked, so either all of them have experts or none has.
    refuse(config, place, {"decoder_sparse_step": 1, "mlp_only_layers": []})
    window = None
    if flag(config, place, "use_sliding_window", False):
        window = optional(integer, config, place, "sliding_window", 4096)
    # The key has a new name since transformers 5.
    count = "num_local_experts" if config.get("num_experts") is None else "num_experts"
    return DecoderConfig(
        **sizes(config, place, key_value_heads=4),
        **llama.common_from_hf(config, place),
        family=architecture.family,
        reward=architecture.reward,
        rope=rope_from_hf(config, place),
        window=window,
        attention_bias=flag(config, place, "attention_bias", False),
        query_key_norm=True,
        experts=integer(config, place, count, 128),
        experts_per_token=integer(config, place, "num_experts_per_tok", 8),
        expert_intermediate_size=integer(config, place, "moe_intermediate_size", 768),
        renormalize_experts=flag(config, place, "norm_topk_prob", False),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return llama.common_to_hf(config, ARCHITECTURES) | {
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": config.experts,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_intermediate_size or config.intermediate_size,
        "norm_topk_prob": config.renormalize_experts,
    }


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    block = "model.layers.{layer}.mlp."
    parts = {part: f"{block}experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down")}
    return {**llama.table(config), **experts(f"{block}gate", **parts)}
