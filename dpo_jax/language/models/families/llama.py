"""Llama: root-mean-square norms, rotary positions, gated SiLU. The other families differ from it in features."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families.keys import Architecture, architecture_name, choice, flag, number, sizes
from dpo_jax.language.models.families.rope import rope_from_hf, rope_parameters
from dpo_jax.language.models.families.table import Table, ends, linears, norms

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "LlamaForSequenceClassification": Architecture("llama", reward=True),
}
PREFIX = "model."  # of the names of all but the head


def common_from_hf(config: Mapping[str, Any], place: str, *, norm_epsilon: float = 1e-6) -> dict[str, Any]:
    """What Llama and its next of kin read alike, but for sizes: fields of `DecoderConfig`."""
    choice(config, place, "hidden_act", "silu", {"silu": "silu"})
    return {
        "norm_epsilon": number(config, place, "rms_norm_eps", norm_epsilon),
        "tie_embeddings": flag(config, place, "tie_word_embeddings", False),
        "initializer_range": number(config, place, "initializer_range", 0.02),
    }


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    return DecoderConfig(
        **sizes(config, place),
        **common_from_hf(config, place),
        family=architecture.family,
        reward=architecture.reward,
        rope=rope_from_hf(config, place),
        attention_bias=flag(config, place, "attention_bias", False),
        mlp_bias=flag(config, place, "mlp_bias", False),
    )


def common_to_hf(config: DecoderConfig, architectures: Mapping[str, Architecture]) -> dict[str, Any]:
    """The keys of config.json that Llama and its next of kin have alike; both layouts of the rotary settings, so that
    any transformers reads them."""
    return {
        "architectures": [architecture_name(architectures, config.family, config.reward)],
        "model_type": config.family,
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
        "rope_parameters": rope_parameters(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return common_to_hf(config, ARCHITECTURES) | biases


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    layer = "model.layers.{layer}."
    return {
        **ends("model.embed_tokens", "model.norm"),
        **norms(
            {
                "layers/attention_norm": f"{layer}input_layernorm",
                "layers/feed_forward_norm": f"{layer}post_attention_layernorm",
                "layers/attention/query_norm": f"{layer}self_attn.q_norm",
                "layers/attention/key_norm": f"{layer}self_attn.k_norm",
            }
        ),
        **linears(
            {
                "attention/query": f"{layer}self_attn.q_proj",
                "attention/key": f"{layer}self_attn.k_proj",
                "attention/value": f"{layer}self_attn.v_proj",
                "attention/output": f"{layer}self_attn.o_proj",
                "feed_forward/gate": f"{layer}mlp.gate_proj",
                "feed_forward/up": f"{layer}mlp.up_proj",
                "feed_forward/down": f"{layer}mlp.down_proj",
            }
        ),
    }
