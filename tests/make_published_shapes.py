"""Names and shapes of the tensors of one published checkpoint per family, kept in tests/fixtures/published.json.

    python tests/make_published_shapes.py

The keys are those of the checkpoint's config.json that say what it is; the tensors are those of transformers' own
module of that size, built without memory, which keeps experts in one tensor and the file each by itself. Layers are one
pattern, such as `model.layers.{0..27}.mlp.up_proj.weight`, and so are the experts in them.
"""

import json
import re
from itertools import product
from pathlib import Path

from make_family_fixtures import apart

FILE = Path(__file__).parent / "fixtures" / "published.json"


def llama_like(architecture: str, model_type: str, sizes: tuple[int, ...], **keys) -> dict:
    """config.json from vocabulary, width, inner width, layers, heads and shared heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sized = dict(zip((*names, "num_key_value_heads"), sizes))
    return {"architectures": [architecture], "model_type": model_type, **sized, **keys}


PUBLISHED: dict[str, dict] = {
    "meta-llama/Llama-3.1-8B": llama_like(
        "LlamaForCausalLM",
        "llama",
        (128256, 4096, 14336, 32, 32, 8),
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Qwen/Qwen2.5-7B-Instruct": llama_like(
        "Qwen2ForCausalLM",
        "qwen2",
        (152064, 3584, 18944, 28, 28, 4),
        rope_theta=1000000.0,
        use_sliding_window=False,
        sliding_window=131072,
        max_window_layers=28,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-0.6B": llama_like(
        "Qwen3ForCausalLM",
        "qwen3",
        (151936, 1024, 3072, 28, 16, 8),
        head_dim=128,
        rope_theta=1000000,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=28,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "mistralai/Mistral-7B-v0.1": llama_like(
        "MistralForCausalLM", "mistral", (32000, 4096, 14336, 32, 32, 8), rope_theta=10000.0, sliding_window=4096
    ),
    "google/gemma-2-2b": llama_like(
        "Gemma2ForCausalLM",
        "gemma2",
        (256000, 2304, 9216, 26, 8, 4),
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "google/gemma-3-1b-it": llama_like(
        "Gemma3ForCausalLM",
        "gemma3_text",
        (262144, 1152, 6912, 26, 4, 1),
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_theta=1000000,
        rope_local_base_freq=10000,
        rope_scaling=None,
        hidden_activation="gelu_pytorch_tanh",
    ),
    "microsoft/Phi-3-mini-4k-instruct": llama_like(
        "Phi3ForCausalLM",
        "phi3",
        (32064, 3072, 8192, 32, 32, 32),
        rope_theta=10000.0,
        rope_scaling=None,
        sliding_window=2047,
        tie_word_embeddings=False,
    ),
    "microsoft/phi-2": llama_like(
        "PhiForCausalLM",
        "phi",
        (51200, 2560, 10240, 32, 32, 32),
        partial_rotary_factor=0.4,
        qk_layernorm=False,
        hidden_act="gelu_new",
        rope_theta=10000.0,
        rope_scaling=None,
    ),
    "EleutherAI/pythia-160m": llama_like(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        (50304, 768, 3072, 12, 12),
        rotary_pct=0.25,
        rotary_emb_base=10000,
        hidden_act="gelu",
        use_parallel_residual=True,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-30B-A3B": llama_like(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (151936, 2048, 6144, 48, 32, 4),
        head_dim=128,
        attention_bias=False,
        decoder_sparse_step=1,
        max_window_layers=48,
        mlp_only_layers=[],
        moe_intermediate_size=768,
        norm_topk_prob=True,
        num_experts=128,
        num_experts_per_tok=8,
        rope_scaling=None,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.001,
        sliding_window=None,
        use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    "mistralai/Mixtral-8x7B-v0.1": llama_like(
        "MixtralForCausalLM",
        "mixtral",
        (32000, 4096, 14336, 32, 32, 8),
        num_local_experts=8,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        router_aux_loss_coef=0.02,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    "openai-community/gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "n_ctx": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
    },
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_RANGE = re.compile(r"\{0\.\.(\d+)\}")


def shapes_of(config: dict) -> dict[str, list[int]]:
    """Names in the file and shapes, by transformers' own module on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys))
    # The file of a GPT-NeoX calls its head otherwise than the module does.
    head = "embed_out." if config["model_type"] == "gpt_neox" else "lm_head."
    shapes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        tensors = apart(re.sub(r"^lm_head\.", head, name), parameter, mixtral=config["model_type"] == "mixtral")
        shapes |= {name: list(tensor.shape) for name, tensor in tensors.items()}
    return shapes


def packed(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names that differ in the number of their layer as one, if all have one shape."""
    numbers: dict[str, set[tuple[int, ...]]] = {}
    patterns: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        pattern = _NUMBER.sub("{}", name)
        numbers.setdefault(pattern, set()).add(tuple(int(found) for found in _NUMBER.findall(name)))
        if patterns.setdefault(pattern, shape) != shape:
            raise ValueError(f"{pattern} has shapes {patterns[pattern]} and {shape}")
    whole = {}
    for pattern, shape in patterns.items():
        last = [max(values) for values in zip(*numbers[pattern])]
        if numbers[pattern] != set(product(*(range(n + 1) for n in last))):
            raise ValueError(f"{pattern} is there for {sorted(numbers[pattern])} only")
        whole[pattern.format(*(f"{{0..{n}}}" for n in last))] = shape
    return whole


def unpacked(patterns: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, shape in patterns.items():
        ranges = [range(int(last) + 1) for last in _RANGE.findall(pattern)]
        whole = _RANGE.sub("{}", pattern)
        shapes |= dict.fromkeys((whole.format(*numbers) for numbers in product(*ranges)), tuple(shape))
    return shapes


def published() -> dict[str, dict]:
    """What the file holds."""
    return {name: {"config": config, "tensors": packed(shapes_of(config))} for name, config in PUBLISHED.items()}


def main() -> None:
    lines = []
    for name, entry in published().items():
        tensors = ",\n".join(f"   {json.dumps(key)}: {shape}" for key, shape in entry["tensors"].items())
        config = json.dumps(entry["config"])
        lines.append(f' {json.dumps(name)}: {{\n  "config": {config},\n  "tensors": {{\n{tensors}\n  }}\n }}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(FILE, FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
