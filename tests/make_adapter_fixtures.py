"""Tiny adapters of a decoder's fixture with the numbers that PEFT gives for them, kept under tests/fixtures/adapters.

    python tests/make_adapter_fixtures.py

Each folder holds adapter_config.json, adapter_model.safetensors and expected.npz: tokens [R, L], and from torch in
float32 logits [R, L, V] of the adapted model and `merged:NAME` of each kernel that merging changes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from make_decoder_fixtures import FOLDER as DECODERS

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
}


def inputs() -> np.ndarray:
    return np.random.default_rng(11).integers(0, 64, (2, 9)).astype(np.int32)


def torch_numbers(model) -> dict[str, Any]:
    """Logits of a PEFT model, and the kernels that it merges; the model is used up."""
    import torch

    tokens = inputs()
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        before = {name.replace(".base_layer", ""): p.clone() for name, p in model.base_model.model.named_parameters()}
        merged = dict(model.merge_and_unload().named_parameters())
    changed = {f"merged:{n}": p.detach().numpy() for n, p in merged.items() if not torch.equal(p, before[n])}
    return {"tokens": tokens, "logits": logits} | changed


def base_model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    for variant, options in VARIANTS.items():
        torch.manual_seed(3)
        model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
            elif "magnitude" in name:
                parameter.data *= torch.empty_like(parameter).uniform_(0.5, 1.5)
        folder = FOLDER / variant
        model.peft_config["default"].base_model_name_or_path = BASE.name
        model.save_pretrained(str(folder))
        (folder / "README.md").unlink()
        np.savez_compressed(folder / "expected.npz", **torch_numbers(model))
        print(folder, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
