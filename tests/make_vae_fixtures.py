"""What diffusers' AutoencoderKL computes on tiny models, and the names of published ones: tests/fixtures/vae.

    python tests/make_vae_fixtures.py

expected.npz holds for each of `VARIANTS` moments and images, of `TILED` also those made tile by tile, of the others
`gradients` of a weighted sum of both, all tensors in the order of their names. Weights and inputs come from a formula.
published.txt.gz holds one line for each tensor of `PUBLISHED`.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "diffusion"))
from formula_weights import chirp, fill, write_published

FOLDER = Path(__file__).parent / "fixtures" / "vae"
SIZE, LARGE = (2, 8, 12, 3), (1, 40, 28, 3)
TILED = "sd3"


def blocks(*channels: int, **keys) -> dict:
    """Keys of config.json from the channels at each resolution."""
    return {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        **keys,
    }


VARIANTS: dict[str, dict] = {
    "sd": blocks(2, 4, 4, layers_per_block=1, norm_num_groups=2, sample_size=32),
    "sd3": blocks(
        2,
        4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
        latent_channels=5,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}
_FULL = {"layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu", "in_channels": 3, "out_channels": 3}
PUBLISHED: dict[str, dict] = {
    "sd15": blocks(128, 256, 512, 512, **_FULL, latent_channels=4, sample_size=512),
    "sdxl": blocks(128, 256, 512, 512, **_FULL, latent_channels=4, sample_size=1024, scaling_factor=0.13025),
    "sd3": blocks(
        128,
        256,
        512,
        512,
        **_FULL,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def inputs(variant: str) -> dict[str, np.ndarray]:
    """Images and latents with the channels last; large ones for tiles."""
    factor = 2 ** (len(VARIANTS[variant]["block_out_channels"]) - 1)
    channels = VARIANTS[variant].get("latent_channels", 4)
    sizes = {name: (b, h // factor, w // factor, channels) for name, (b, h, w, _) in (("", SIZE), ("large_", LARGE))}
    return {
        "images": chirp("images", SIZE),
        "large_images": chirp("large images", LARGE),
        "latents": chirp("latents", sizes[""]),
        "large_latents": chirp("large latents", sizes["large_"]),
    }


def torch_numbers(config: dict, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Moments, images and gradients by diffusers, channels last."""
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**config)
    fill(model)
    first = {name: torch.tensor(value).permute(0, 3, 1, 2) for name, value in given.items()}

    def moments(images) -> "torch.Tensor":
        return model.encode(images).latent_dist.parameters

    found = {"moments": moments(first["images"]), "decoded": model.decode(first["latents"]).sample}
    loss = sum((value * torch.tensor(chirp(name, tuple(value.shape)))).sum() for name, value in found.items())
    loss.backward()
    gradients = {name: p.grad.numpy().ravel() for name, p in model.named_parameters()}
    model.enable_tiling()
    with torch.no_grad():
        found["tiled_moments"] = moments(first["large_images"])
        found["tiled_decoded"] = model.decode(first["large_latents"]).sample
    return {name: value.detach().permute(0, 2, 3, 1).numpy() for name, value in found.items()} | {
        "gradients": np.concatenate([gradients[name] for name in sorted(gradients)])
    }


def published(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes by diffusers' own module on no device."""
    import torch
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(**config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    numbers = {v: torch_numbers(config, inputs(v)) for v, config in VARIANTS.items()}
    flat = {f"{v}/{name}": value for v, values in numbers.items() for name, value in values.items()}
    # Tiles of one variant and gradients of the other are enough to keep.
    left_out = {
        f"{v}/{n}" for v in VARIANTS for n in (["gradients"] if v == TILED else ["tiled_moments", "tiled_decoded"])
    }
    flat = {name: value for name, value in flat.items() if name not in left_out}
    np.savez_compressed(FOLDER / "expected.npz", **flat)
    write_published(FOLDER / "published.txt.gz", {name: published(config) for name, config in PUBLISHED.items()})
    print({file.name: file.stat().st_size for file in FOLDER.iterdir()})


if __name__ == "__main__":
    main()
