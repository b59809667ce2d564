"""Numbers of tiny UNets by torch diffusers, and names and shapes of the published ones, kept in tests/fixtures/unet.

    python tests/make_unet_fixtures.py

NAME.npz holds inputs and, from torch in float32, `output`, gradients of sum(output * weights) with respect to the
latents and the states, and for each tensor `sums`: [sum of squares, sum times fixed random numbers] of its gradient.
Weights are not stored: they come from NumPy by the tensor's name (`tensor_values`). NAME.txt.gz holds a published
config.json in its first line and a tensor's name and shape in each other.
"""

import gzip
import json
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "fixtures" / "unet"
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*attention: bool) -> dict:
    """Types of the blocks from which resolutions have attention."""
    kinds = [CROSS if has else PLAIN for has in attention]
    return {"down_block_types": [down for down, _ in kinds], "up_block_types": [up for _, up in reversed(kinds)]}


TINY = {"norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6, "sample_size": 8}
VARIANTS: dict[str, dict] = {
    "sd1": {**TINY, **blocks(True, False), "block_out_channels": [8, 12], "attention_head_dim": 2},
    "sd2": {
        **TINY,
        **blocks(True, True, False),
        "block_out_channels": [8, 12, 16],
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
        "norm_eps": 1e-4,
    },
    "sdxl": {
        **TINY,
        **blocks(False, True),
        "block_out_channels": [8, 16],
        "layers_per_block": 2,
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 29,
    },
    "pixels": {
        **TINY,
        **blocks(False, True),
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": [8, 8],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}
# The keys of config.json that matter, as published.
PUBLISHED: dict[str, dict] = {
    "stable-diffusion-v1-5": {
        **blocks(True, True, True, False),
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "layers_per_block": 2,
        "sample_size": 64,
    },
    "stable-diffusion-2-1": {
        **blocks(True, True, True, False),
        "block_out_channels": [320, 640, 1280, 1280],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "layers_per_block": 2,
        "dual_cross_attention": False,
        "use_linear_projection": True,
        "upcast_attention": True,
        "sample_size": 96,
    },
    "stable-diffusion-xl-base-1.0": {
        **blocks(False, True, True),
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}


def tensor_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's weights: norms near 1, biases near 0, kernels that keep the size of what passes; none trivial."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)  # the same in every NumPy
    if name.endswith("bias"):
        return (0.1 * normal).astype(np.float32)
    return (1 + 0.1 * normal if len(shape) == 1 else normal / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def probe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Fixed random numbers that a gradient is multiplied with."""
    return np.random.RandomState(zlib.crc32(name.encode()) + 1).standard_normal(shape) / np.sqrt(np.prod(shape))


def gradient_sums(name: str, gradient: np.ndarray) -> np.ndarray:
    """Two numbers that say what a gradient is; float32 [2]."""
    wide = gradient.astype(np.float64)
    return np.array([np.sqrt(np.sum(wide**2)), np.sum(wide * probe(name, gradient.shape))], np.float32)


def inputs(config: dict, *, batch: int = 2, height: int = 8, width: int = 6) -> dict[str, np.ndarray]:
    """Latents [B, H, W, C], timesteps, a condition, weights of the scalar to differentiate."""
    rng = np.random.RandomState(5)
    given = {
        "latents": rng.standard_normal((batch, height, width, config.get("in_channels", 4))),
        "timesteps": np.array([3.0, 731.0, 999.0, 0.0])[:batch],
        "states": rng.standard_normal((batch, 5, config["cross_attention_dim"])),
        "weights": rng.standard_normal((batch, height, width, config.get("out_channels", 4))),
    }
    if "addition_embed_type" in config:
        given["pooled"] = rng.standard_normal((batch, 5))
        given["sizes"] = np.array([[64, 48, 0, 8, 64, 64], [32, 32, 4, 0, 64, 64]] * 2)[:batch]
    else:
        given["mask"] = np.arange(5) < np.array([[5], [3], [4], [2]])[:batch]
    return {name: value if value.dtype == bool else value.astype(np.float32) for name, value in given.items()}


def torch_model(config: dict):
    """diffusers' model of a config with the weights of `tensor_values`."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_config(config)
    state = {name: torch.tensor(tensor_values(name, tuple(p.shape))) for name, p in model.named_parameters()}
    model.load_state_dict(state)
    return model.eval()


def torch_output(model, given: dict[str, np.ndarray]):
    """(output [B, C, H, W], latents, states) as torch tensors, the last two with gradients."""
    import torch

    latents = torch.tensor(np.moveaxis(given["latents"], -1, 1).copy(), requires_grad=True)
    states = torch.tensor(given["states"], requires_grad=True)
    added, mask = {}, None
    if "pooled" in given:
        added = {"text_embeds": torch.tensor(given["pooled"]), "time_ids": torch.tensor(given["sizes"])}
    else:
        mask = torch.tensor(given["mask"])
    times = torch.tensor(given["timesteps"])
    output = model(latents, times, states, added_cond_kwargs=added, encoder_attention_mask=mask).sample
    return output, latents, states


def torch_numbers(config: dict, given: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Output and gradients of the inputs, channels last; gradients of the tensors by name."""
    import torch

    model = torch_model(config)
    output, latents, states = torch_output(model, given)
    (output * torch.tensor(np.moveaxis(given["weights"], -1, 1).copy())).sum().backward()
    values = {
        "output": np.moveaxis(output.detach().numpy(), 1, -1),
        "latents_gradient": np.moveaxis(latents.grad.numpy(), 1, -1),
        "states_gradient": states.grad.numpy(),
    }
    return values, {name: p.grad.numpy() for name, p in model.named_parameters()}


def numbers(name: str) -> dict[str, np.ndarray]:
    """What a variant's file holds."""
    given = inputs(VARIANTS[name])
    values, gradients = torch_numbers(VARIANTS[name], given)
    sums = np.stack([gradient_sums(tensor, gradients[tensor]) for tensor in sorted(gradients)])
    return given | values | {"tensors": np.array(sorted(gradients)), "sums": sums}


def published_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of diffusers' own module, built without memory."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def read_published(name: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """(config.json, tensor -> shape) of a published model."""
    first, *lines = gzip.decompress((FOLDER / f"{name}.txt.gz").read_bytes()).decode().splitlines()
    entries = (line.split() for line in lines)
    return json.loads(first), {tensor: tuple(int(size) for size in sizes) for tensor, *sizes in entries}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in VARIANTS:
        np.savez_compressed(FOLDER / f"{name}.npz", **numbers(name))
    for name, config in PUBLISHED.items():
        lines = [f"{tensor} {' '.join(map(str, shape))}" for tensor, shape in sorted(published_shapes(config).items())]
        text = "\n".join([json.dumps(config), *lines]) + "\n"
        (FOLDER / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    for file in sorted(FOLDER.iterdir()):
        print(file, file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
