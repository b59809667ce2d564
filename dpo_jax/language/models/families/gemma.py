"""Gemma 2 and 3 (text): local and global layers in turn, norms before and behind each part, scaled embeddings.

Gemma 2 caps scores and logits; Gemma 3 norms query and key heads instead, and gives local layers a base of their own.
"""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import (
    Architecture,
    WeightsError,
    choice,
    flag,
    integer,
    layer_types,
    local_layers,
    number,
    optional,
    refuse,
    sizes,
    windows,
)
from dpo_jax.language.models.families.rope import read_rope, rope_from_hf, rope_parameters
from dpo_jax.language.models.families.table import Table, norms
from dpo_jax.language.models.rope import RopeConfig

ARCHITECTURES = {
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma2ForSequenceClassification": Architecture("gemma2", reward=True),
    "Gemma3ForCausalLM": Architecture("gemma3_text"),
    "Gemma3TextForSequenceClassification": Architecture("gemma3_text", reward=True),
}
PREFIX = llama.PREFIX


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    refuse(config, place, {"use_bidirectional_attention": False})
    third = architecture.family == "gemma3_text"
    measures = sizes(config, place, key_value_heads=4, head_dim=256, multiples=True)
    # Every pattern-th layer is global.
    pattern = integer(config, place, "sliding_window_pattern", 6) if third else 2
    local = local_layers(config, place, measures["layers"], lambda layer: (layer + 1) % pattern > 0)
    window = optional(integer, config, place, "sliding_window", 4096)
    if window is None and any(local):
        raise WeightsError(f"{place}: sliding_window is null, but layer_types has local layers; give the window")
    rope, local_rope = _ropes(config, place) if third else (rope_from_hf(config, place), None)
    return DecoderConfig(
        **measures,
        **windows(window, local),
        family=architecture.family,
        reward=architecture.reward,
        rope=rope,
        local_rope=local_rope if any(local) else None,
        norm="rms_offset",
        norm_epsilon=number(config, place, "rms_norm_eps", 1e-6),
        post_norms=True,
        query_key_norm=third,
        activation=choice(config, place, "hidden_activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "gelu_tanh"}),
        embedding_scale=True,
        tie_embeddings=flag(config, place, "tie_word_embeddings", True),
        attention_bias=flag(config, place, "attention_bias", False),
        initializer_range=number(config, place, "initializer_range", 0.02),
        query_scalar=number(config, place, "query_pre_attn_scalar", 256),
        # The attention of Gemma 3 has a key for it, and its implementation passes over it.
        attention_softcap=None if third else optional(number, config, place, "attn_logit_softcapping", 50.0),
        logit_softcap=optional(number, config, place, "final_logit_softcapping", None if third else 30.0),
    )


def _ropes(config: Mapping[str, Any], place: str) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of global and of local layers; before transformers 5 only the global ones could be scaled."""
    settings = config.get("rope_parameters") or {}
    parts = {"full_attention": config.get("rope_scaling") or {}, "sliding_attention": {}}
    if not isinstance(settings, Mapping) or settings.keys() - parts.keys():
        raise WeightsError(f"{place}: rope_parameters is {settings!r}; expected an object with {', '.join(parts)}")
    for kind in parts:
        given = settings.get(kind) or {}
        if not isinstance(given, Mapping) or not isinstance(parts[kind], Mapping):
            raise WeightsError(f"{place}: the rotary settings of {kind} are no object")
        parts[kind] = {**parts[kind], **given}
        refuse(parts[kind], place, {"partial_rotary_factor": 1})
    near = read_rope(parts["sliding_attention"], config, place, theta=10000.0, theta_key="rope_local_base_freq")
    return read_rope(parts["full_attention"], config, place, theta=1000000.0), near


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    written = llama.common_to_hf(config, ARCHITECTURES)
    scalar = config.query_scalar or config.head_dim
    written |= {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
        # A whole number, as transformers wants it, wherever it is one.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
        "sliding_window": config.window,
        "layer_types": layer_types(config.layers, config.window, config.local_layers),
    }
    if config.family == "gemma3_text":
        near = config.local_rope or RopeConfig(10000.0)
        parameters = {"full_attention": rope_parameters(config.rope), "sliding_attention": rope_parameters(near)}
        written |= {"rope_parameters": parameters, "rope_local_base_freq": near.theta}
    return written


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    layer = "model.layers.{layer}."
    return {
        **llama.table(config),
        **norms(
            {
                "layers/attention_post_norm": f"{layer}post_attention_layernorm",
                "layers/feed_forward_norm": f"{layer}pre_feedforward_layernorm",
                "layers/feed_forward_post_norm": f"{layer}post_feedforward_layernorm",
            }
        ),
    }
