"""Adapters of a tiny UNet as diffusers writes them, with its numbers, kept in tests/fixtures/unet_adapters.

    python tests/make_unet_adapter_fixtures.py

Each folder holds pytorch_lora_weights.safetensors for the variant `sd1` of make_unet_fixtures.py, and expected.npz with
the `output` of torch in float32 for the inputs given there.
"""

import zlib
from pathlib import Path

import numpy as np
from make_unet_fixtures import VARIANTS, inputs, torch_model, torch_output

FOLDER = Path(__file__).parent / "fixtures" / "unet_adapters"
BASE = VARIANTS["sd1"]
# Name -> PEFT's options; proj_in is a pointwise convolution there.
ADAPTERS: dict[str, dict] = {
    "lora": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["to_q", "to_out.0", "ff.net.0.proj", "proj_in"],
        "rank_pattern": {"attn2.to_q": 3},
        "alpha_pattern": {"proj_in": 5, "attn2.to_out.0": 0.5},
    },
    "dora": {"r": 2, "lora_alpha": 2, "use_dora": True, "use_rslora": True, "target_modules": ["to_v", "proj_in"]},
}


def random_factors(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a factor (near 0) or of the norms of DoRA (near 1), by name."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (1 + 0.2 * normal if "magnitude" in name else 0.5 * normal).astype(np.float32)


def torch_adapted(name: str):
    """diffusers' model with an adapter whose numbers are random."""
    import torch
    from peft import LoraConfig

    model = torch_model(BASE)
    model.add_adapter(LoraConfig(init_lora_weights=False, **ADAPTERS[name]))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.tensor(random_factors(key, tuple(parameter.shape)))
    return model


def output_of(model) -> np.ndarray:
    """What it predicts, [B, H, W, C]."""
    return np.moveaxis(torch_output(model, inputs(BASE))[0].detach().numpy(), 1, -1)


def write(folder: Path, name: str) -> None:
    """A folder as described above."""
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    model = torch_adapted(name)
    options = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(model), unet_lora_adapter_metadata=options
    )
    np.savez_compressed(folder / "expected.npz", output=output_of(model))


def main() -> None:
    for name in ADAPTERS:
        write(FOLDER / name, name)
        print(FOLDER / name, sum(file.stat().st_size for file in (FOLDER / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
