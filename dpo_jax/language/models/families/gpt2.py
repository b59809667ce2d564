"""GPT-2: learned positions, layer norms, and kernels that the checkpoint keeps as [in, out]."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families.keys import (
    GELUS,
    Architecture,
    WeightsError,
    architecture_name,
    choice,
    flag,
    gelu_name,
    integer,
    number,
    refuse,
)
from dpo_jax.language.models.families.table import Place, Table, ends, fused, linears, norms, side_by_side

ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture("gpt2"),
    "GPT2ForSequenceClassification": Architecture("gpt2", reward=True),
}
PREFIX = "transformer."


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    refuse(config, place, usual)
    keys = ("vocab_size", "n_embd", "n_layer", "n_head")
    if missing := [key for key in keys if config.get(key) is None]:
        raise WeightsError(f"{place}: the keys {', '.join(missing)} are missing")
    vocabulary, hidden, layers, heads = (integer(config, place, key) for key in keys)
    if hidden % heads:
        raise WeightsError(f"{place}: n_head is {heads}; n_embd {hidden} is no multiple of it")
    return DecoderConfig(
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=integer(config, place, "n_inner", 4 * hidden),
        layers=layers,
        heads=heads,
        key_value_heads=heads,
        head_dim=hidden // heads,
        family=architecture.family,
        reward=architecture.reward,
        learned_positions=integer(config, place, "n_positions", 1024),
        norm="layer",
        norm_epsilon=number(config, place, "layer_norm_epsilon", 1e-5),
        activation=choice(config, place, "activation_function", "gelu_new", GELUS),
        gated=False,
        attention_bias=True,
        mlp_bias=True,
        tie_embeddings=flag(config, place, "tie_word_embeddings", True),
        initializer_range=number(config, place, "initializer_range", 0.02),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    return {
        "architectures": [architecture_name(ARCHITECTURES, config.family, config.reward)],
        "model_type": config.family,
        "vocab_size": config.vocabulary_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.learned_positions,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": gelu_name(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    layer = "transformer.h.{layer}."
    heads = {f"attention/{name}": config.hidden_size for name in ("query", "key", "value")}
    return {
        **ends("transformer.wte", "transformer.ln_f"),
        "positions/embedding": Place("transformer.wpe.weight"),
        **norms({"layers/attention_norm": f"{layer}ln_1", "layers/feed_forward_norm": f"{layer}ln_2"}),
        **fused(f"{layer}attn.c_attn", side_by_side(heads), transposed=False),
        **linears(
            {
                "attention/output": f"{layer}attn.c_proj",
                "feed_forward/up": f"{layer}mlp.c_fc",
                "feed_forward/down": f"{layer}mlp.c_proj",
            },
            transposed=False,
        ),
    }
