"""Names and shapes of the tensors of one published checkpoint per family, kept in tests/fixtures/published.json.

    python tests/make_published_shapes.py

The keys are those of the checkpoint's config.json that say what it is; the tensors are those of transformers' own
module of that size, built without memory. Layers are one pattern, such as `model.layers.{0..27}.mlp.up_proj.weight`.
"""

import json
import re
from pathlib import Path

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


def shapes_of(config: dict) -> dict[str, list[int]]:
    """Names in the file and shapes, by transformers' own module on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys))
    # The file of a GPT-NeoX calls its head otherwise than the module does.
    head = "embed_out." if config["model_type"] == "gpt_neox" else "lm_head."
    return {re.sub(r"^lm_head\.", head, name): list(p.shape) for name, p in model.named_parameters()}


def packed(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names that differ in the number of their layer as one, if all have one shape."""
    numbers: dict[str, set[int]] = {}
    patterns: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        pattern = _NUMBER.sub("{}", name)
        numbers.setdefault(pattern, set()).update(int(found) for found in _NUMBER.findall(name))
        if patterns.setdefault(pattern, shape) != shape:
            raise ValueError(f"{pattern} has shapes {patterns[pattern]} and {shape}")
    for pattern, layers in numbers.items():
        if layers and layers != set(range(len(layers))):
            raise ValueError(f"{pattern} is there for layers {sorted(layers)} only")
    return {p.replace("{}", f"{{0..{len(numbers[p]) - 1}}}"): shape for p, shape in patterns.items()}


def unpacked(patterns: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, shape in patterns.items():
        found = re.search(r"\{0\.\.(\d+)\}", pattern)
        names = [pattern.replace(found[0], str(i)) for i in range(int(found[1]) + 1)] if found else [pattern]
        shapes |= dict.fromkeys(names, tuple(shape))
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
