"""GPT-NeoX and Pythia: parallel residuals, layer norms, partial rotation, query, key and value fused head by head."""

from collections.abc import Mapping
from typing import Any

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import llama
from dpo_jax.language.models.families.keys import GELUS, Architecture, choice, flag, gelu_name, number, sizes
from dpo_jax.language.models.families.rope import read_rope, rope_settings, rotary_dim, rotary_factor
from dpo_jax.language.models.families.table import Part, Table, ends, fused, linears, norms

ARCHITECTURES = {
    "GPTNeoXForCausalLM": Architecture("gpt_neox"),
    "GPTNeoXForSequenceClassification": Architecture("gpt_neox", reward=True),
}
PREFIX = "gpt_neox."


def config_from_hf(config: Mapping[str, Any], architecture: Architecture, place: str) -> DecoderConfig:
    """Decoder config of a config.json."""
    # Heads share nothing and their width is never given.
    measures = sizes({**config, "num_key_value_heads": None, "head_dim": None}, place)
    parallel = flag(config, place, "use_parallel_residual", True)
    return DecoderConfig(
        **measures,
        family=architecture.family,
        reward=architecture.reward,
        rope=read_rope(rope_settings(config, place), config, place, theta_key="rotary_emb_base"),
        rotary_dim=rotary_dim(config, place, measures["head_dim"], 0.25, key="rotary_pct"),
        norm="layer",
        norm_epsilon=number(config, place, "layer_norm_eps", 1e-5),
        residual="parallel" if parallel else "sequential",
        activation=choice(config, place, "hidden_act", "gelu", GELUS),
        gated=False,
        attention_bias=flag(config, place, "attention_bias", True),
        mlp_bias=True,
        tie_embeddings=flag(config, place, "tie_word_embeddings", False),
        initializer_range=number(config, place, "initializer_range", 0.02),
    )


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    written = llama.common_to_hf(config, ARCHITECTURES)
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        del written[key]
    factor = rotary_factor(config.rotary_dim, config.head_dim)
    written["rope_parameters"] |= {"partial_rotary_factor": factor}
    return written | {
        "rotary_pct": factor,
        "rotary_emb_base": config.rope.theta,
        "hidden_act": gelu_name(config.activation),
        "layer_norm_eps": config.norm_epsilon,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.attention_bias,
    }


def table(config: DecoderConfig) -> Table:
    """Where each variable stands in the checkpoint."""
    layer, size = "gpt_neox.layers.{layer}.", config.head_dim
    heads = {
        f"attention/{name}": Part(start * size, size, 3 * size, config.heads)
        for start, name in enumerate(("query", "key", "value"))
    }
    return {
        **ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", head="embed_out"),
        **norms(
            {
                "layers/attention_norm": f"{layer}input_layernorm",
                "layers/feed_forward_norm": f"{layer}post_attention_layernorm",
            }
        ),
        **fused(f"{layer}attention.query_key_value", heads),
        **linears(
            {
                "attention/output": f"{layer}attention.dense",
                "feed_forward/up": f"{layer}mlp.dense_h_to_4h",
                "feed_forward/down": f"{layer}mlp.dense_4h_to_h",
            }
        ),
    }
