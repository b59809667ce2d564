"""Phi 1, 1.5 and 2 (attention and feed-forward in parallel), and Phi 3 and 4 (Llama with fused projections)."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import (
    GELUS,
    Architecture,
    WeightsError,
    choice,
    flag,
    gelu_name,
    integer,
    number,
    optional,
    refuse,
    sizes,
)
from dpo_jax.language.models.families.rope import (
    read_longrope,
    read_rope,
    rope_settings,
    rotary_dim,
    rotary_factor,
)
from dpo_jax.language.models.families.table import Table, ends, fused, linears, norms, side_by_side

ARCHITECTURES = {
    "PhiForCausalLM": Architecture("phi"),
    "PhiForSequenceClassification": Architecture("phi", reward=True),
    "Phi3ForCausalLM": Architecture("phi3"),
    "Phi3ForSequenceClassification": Architecture("phi3", reward=True),
}
PREFIX = llama.PREFIX
# Names that one kind of scaling has had.
_LONG = ("longrope", "su", "yarn")


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    return (_third if architecture.family == "phi3" else _second)(config, architecture, place)


def _second(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    refuse(config, place, {"qk_layernorm": False})
    measures = sizes(config, place)
    return DecoderConfig(
        **measures,
        family=architecture.family,
        reward=architecture.reward,
        rope=read_rope(rope_settings(config, place), config, place),
        rotary_dim=rotary_dim(config, place, measures["head_dim"], 0.5),
        norm="layer",
        norm_epsilon=number(config, place, "layer_norm_eps", 1e-5),
        residual="parallel_shared",
        activation=choice(config, place, "hidden_act", "gelu_new", GELUS),
        gated=False,
        attention_bias=True,
        mlp_bias=True,
        head_bias=True,
        tie_embeddings=flag(config, place, "tie_word_embeddings", False),
        initializer_range=number(config, place, "initializer_range", 0.02),
    )


def _third(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    measures, settings = sizes(config, place), rope_settings(config, place)
    turned = rotary_dim(config, place, measures["head_dim"], 1.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        rope = read_rope(settings, config, place)
    elif kind in _LONG:
        original = integer(config, place, "original_max_position_embeddings", 4096)
        rope = read_longrope(settings, config, place, turned=turned or measures["head_dim"], original=original)
    else:
        raise WeightsError(f"{place}: rope type {kind!r} of a Phi 3 model; there are default, {', '.join(_LONG)}")
    return DecoderConfig(
        **measures,
        **llama.common_from_hf(config, place, norm_epsilon=1e-5),
        family=architecture.family,
        reward=architecture.reward,
        rope=rope,
        rotary_dim=turned,
        window=optional(integer, config, place, "sliding_window", None),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    written = llama.common_to_hf(config, ARCHITECTURES)
    factor = rotary_factor(config.rotary_dim, config.head_dim)
    written["rope_parameters"] |= {"partial_rotary_factor": factor}
    written |= {"partial_rotary_factor": factor}
    if config.family == "phi3":
        if config.rope.kind == "longrope":
            # The class reads it here only.
            written |= {"original_max_position_embeddings": config.rope.original_length}
        return written | {"sliding_window": config.window}
    del written["rms_norm_eps"]
    return written | {
        "hidden_act": gelu_name(config.activation),
        "layer_norm_eps": config.norm_epsilon,
        "qk_layernorm": False,
    }


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    layer = "model.layers.{layer}."
    if config.family == "phi3":
        key = config.key_value_heads * config.head_dim
        heads = {
            "attention/query": config.heads * config.head_dim,
            "attention/key": key,
            "attention/value": key,
        }
        width = config.intermediate_size
        return {
            **llama.table(config),
            **fused(f"{layer}self_attn.qkv_proj", side_by_side(heads)),
            **fused(f"{layer}mlp.gate_up_proj", side_by_side({"feed_forward/gate": width, "feed_forward/up": width})),
        }
    return {
        **ends("model.embed_tokens", "model.final_layernorm"),
        **norms({"layers/attention_norm": f"{layer}input_layernorm"}),
        **linears(
            {
                "attention/query": f"{layer}self_attn.q_proj",
                "attention/key": f"{layer}self_attn.k_proj",
                "attention/value": f"{layer}self_attn.v_proj",
                "attention/output": f"{layer}self_attn.dense",
                "feed_forward/up": f"{layer}mlp.fc1",
                "feed_forward/down": f"{layer}mlp.fc2",
            }
        ),
    }
