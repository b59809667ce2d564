"""Tiny checkpoints of each family with the numbers of torch transformers, kept under tests/fixtures/families.

    python tests/make_family_fixtures.py

Each folder holds config.json and model.safetensors as transformers writes them, and expected.npz as described in
make_decoder_fixtures.py. Weights come from NumPy, so that a folder can be made again anywhere.
"""

from pathlib import Path

import numpy as np
from make_decoder_fixtures import torch_numbers
from safetensors import safe_open

FOLDER = Path(__file__).parent / "fixtures" / "families"
WORDS, LENGTHS = 40, (16, 7, 11)
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Torch gives the padding word no gradient, and here every word is compared.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEWER = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
BASE = {"rope_type": "default", "rope_theta": 500.0}
EXPERTS = {"num_experts_per_tok": 2, "hidden_size": 12}
GEMMA3 = {"num_hidden_layers": 3, "intermediate_size": 8, "query_pre_attn_scalar": 12, **FEWER}
# Name -> class of the config, and its keys; windows are shorter than the rows, so that they matter.
VARIANTS: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2Config", {**SIZES, "rope_parameters": BASE}),
    "qwen2_tied_window": (
        "Qwen2Config",
        {
            **SIZES,
            "rope_parameters": BASE,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", {**SIZES, **FEWER, "head_dim": 12, "rope_parameters": BASE}),
    "mistral": ("MistralConfig", {**SIZES, "rope_parameters": BASE, "sliding_window": 5}),
    "gemma2": (
        "Gemma2Config",
        {
            **SIZES,
            **FEWER,
            "query_pre_attn_scalar": 12,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **SIZES,
            **GEMMA3,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
    ),
    "phi3": ("Phi3Config", {**SIZES, "sliding_window": 6, "rope_parameters": BASE}),
    "phi3_partial": (
        "Phi3Config",
        {**SIZES, **FEWER, "rope_parameters": {**BASE, "partial_rotary_factor": 0.5}, "tie_word_embeddings": True},
    ),
    # One row is longer than the original context, the others are not.
    "phi3_longrope": (
        "Phi3Config",
        {
            **SIZES,
            **FEWER,
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 2.5],
                "long_factor": [1.25, 3.0, 7.0],
            },
        },
    ),
    "phi": (
        "PhiConfig",
        {
            **SIZES,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {**BASE, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {**SIZES, "num_attention_heads": 2, "rope_parameters": {**BASE, "partial_rotary_factor": 0.25}},
    ),
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        {
            **SIZES,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {**BASE, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": WORDS,
            "n_embd": 16,
            "n_inner": 20,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 24,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**SIZES, **FEWER, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 4, "rope_parameters": BASE},
    ),
    "qwen3_moe_renormalized": (
        "Qwen3MoeConfig",
        {
            **SIZES,
            **FEWER,
            **EXPERTS,
            "num_experts": 3,
            "moe_intermediate_size": 4,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {**SIZES, **FEWER, **EXPERTS, "num_local_experts": 3, "intermediate_size": 8, "rope_parameters": BASE},
    ),
}
# Weights of a variant follow from its place in the sorted names; what came later stands behind all others.
LATER = ("qwen3_moe", "qwen3_moe_renormalized", "mixtral", "phi3_longrope")


def seed_of(variant: str) -> int:
    return (sorted(VARIANTS.keys() - set(LATER)) + list(LATER)).index(variant)


def filled(model, seed: int):
    """The model with weights from NumPy, norms and biases not trivial either; names in sorted order."""
    import torch

    rng, scale = np.random.default_rng(seed), 0.3
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = rng.normal(0, scale, tuple(tensor.shape)).astype(np.float32)
            norm = tensor.ndim == 1 and name.endswith("weight") and bool((tensor == 1).all())
            tensor.copy_(torch.tensor(noise + 1 if norm else noise))
    return model


def write_checkpoint(folder: Path, variant: str, *, reward: bool = False) -> Path:
    """config.json and model.safetensors of a variant, written by transformers."""
    import torch
    import transformers

    name, keys = VARIANTS[variant]
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    config = getattr(transformers, name)(**keys, **({"num_labels": 1} if reward else {}))
    torch.manual_seed(0)
    model = filled(auto.from_config(config, dtype=torch.float32), seed_of(variant))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def inputs() -> dict[str, np.ndarray]:
    """Ragged rows of random tokens, padded on the right with zeros, and the weights of the scalar to differentiate."""
    rng = np.random.default_rng(7)
    lengths, longest = np.array(LENGTHS, np.int32), max(LENGTHS)
    kept = np.arange(longest) < lengths[:, None]
    tokens = rng.integers(0, WORDS, kept.shape).astype(np.int32) * kept
    weights = rng.normal(size=(len(LENGTHS), longest - 1)).astype(np.float32) * kept[:, 1:]
    return {"tokens": tokens, "lengths": lengths, "weights": weights}


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """As torch gives them; gradients by the names of the file, where transformers has another for a head."""
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
    head = "embed_out" if "embed_out.weight" in names else "lm_head"
    mixtral = any("block_sparse_moe" in name for name in names)
    values: dict[str, np.ndarray] = {}
    for name, value in torch_numbers(folder, inputs()).items():
        values |= apart(name.replace(":lm_head.", f":{head}."), value, mixtral=mixtral)
    return values


def apart(name: str, value, *, mixtral: bool) -> dict:
    """A tensor of transformers' module by the names of the file, which has one for each expert.

    Args:
      value: array or tensor, [E, 2 F, D] of gate and up, or [E, D, F].
    """
    if ".mlp.gate." in name:
        return {name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name: value}
    if ".experts." not in name:
        return {name: value}
    block, _, part = name.rpartition(".")
    block = block.replace(".mlp.", ".block_sparse_moe.") if mixtral else block
    inner, ends = value.shape[1] // 2, ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    pieces = {ends[2]: value} if part == "down_proj" else {ends[0]: value[:, :inner], ends[1]: value[:, inner:]}
    return {f"{block}.{e}.{end}.weight": piece[e] for end, piece in pieces.items() for e in range(value.shape[0])}


def main() -> None:
    for variant in VARIANTS:
        folder = write_checkpoint(FOLDER / variant, variant)
        np.savez_compressed(folder / "expected.npz", **numbers(folder))
        print(folder, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
