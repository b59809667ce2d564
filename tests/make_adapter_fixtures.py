"""Tiny adapters of the fixtures' models with the numbers that PEFT gives for them, kept under tests/fixtures/adapters.

    python tests/make_adapter_fixtures.py

Each folder holds adapter_config.json, adapter_model.safetensors and expected.npz: tokens [R, L], and from torch in
float32 logits [R, L, V] of the adapted model and `merged:NAME` of each kernel that merging changes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from make_decoder_fixtures import FOLDER as DECODERS
from make_family_fixtures import FOLDER as FAMILIES

BASE = DECODERS / "plain"
FOLDER = Path(__file__).parent / "fixtures" / "adapters"
VARIANTS: dict[str, dict] = {
    "lora": {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"mlp.down_proj": 1, r"layers\.1\.self_attn\.q_proj": 4},
        "alpha_pattern": {"self_attn.(q|k)_proj": 5, r".*layers\.0\.mlp.*": 0.75},
    },
    "dora": {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "upper_layer": {"r": 2, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [1]},
    # Modules that hold several projections.
    "gpt2": {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "gpt2_dora": {"r": 2, "use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "gpt_neox": {
        "r": 2,
        "use_rslora": True,
        "target_modules": ["query_key_value", "dense"],
        "rank_pattern": {r"layers\.1\.attention\.query_key_value": 3},
    },
    "gpt_neox_dora": {"r": 2, "use_dora": True, "target_modules": ["query_key_value"]},
    "phi3": {"r": 3, "target_modules": "all-linear", "alpha_pattern": {"qkv_proj": 5}},
    "phi3_dora": {"r": 2, "lora_alpha": 6, "use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]},
}


def base_of(variant: str) -> Path:
    """Folder of the checkpoint that a variant adapts."""
    family = FAMILIES / variant.removesuffix("_dora")
    return family if family.exists() else BASE


def inputs(words: int) -> np.ndarray:
    return np.random.default_rng(11).integers(0, words, (2, 9)).astype(np.int32)


def torch_numbers(model) -> dict[str, Any]:
    """Logits of a PEFT model, and the kernels that it merges; the model is used up."""
    import torch

    tokens = inputs(model.config.vocab_size)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        before = {name.replace(".base_layer", ""): p.clone() for name, p in model.base_model.model.named_parameters()}
        merged = dict(model.merge_and_unload().named_parameters())
    changed = {f"merged:{n}": p.detach().numpy() for n, p in merged.items() if not torch.equal(p, before[n])}
    return {"tokens": tokens, "logits": logits} | changed


def base_model(folder: Path = BASE):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    for variant, options in VARIANTS.items():
        torch.manual_seed(3)
        model = get_peft_model(base_model(base_of(variant)), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        folder = FOLDER / variant
        model.peft_config["default"].base_model_name_or_path = base_of(variant).name
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink()
        np.savez_compressed(folder / "expected.npz", **torch_numbers(model))
        print(folder, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
