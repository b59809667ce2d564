"""What diffusers' SD3Transformer2DModel computes on tiny models, and the names of published ones: tests/fixtures/mmdit.

    python tests/make_mmdit_fixtures.py

expected.npz holds for each of `VARIANTS` the prediction, the gradient with respect to the text states, and of those
with respect to parameters two sums each (`digest`); weights and inputs come from a formula. published.txt.gz holds one
line for each tensor of `PUBLISHED`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent / "diffusion"))
from formula_weights import chirp, fill, write_published

FOLDER = Path(__file__).parent / "fixtures" / "mmdit"
_TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 5,
    "pos_embed_max_size": 6,
}
VARIANTS: dict[str, dict] = {
    "sd3": {**_TINY, "num_layers": 3},
    "sd35": {**_TINY, "num_layers": 4, "dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
}
_FULL = {"attention_head_dim": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
PUBLISHED: dict[str, dict] = {
    "sd3_medium": {
        **_FULL,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "sd35_medium": {
        **_FULL,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd35_large": {
        **_FULL,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}


def inputs() -> dict[str, np.ndarray]:
    """Latents [B, H, W, C], timesteps [B], text states [B, S, E] and pooled [B, P]."""
    return {
        "latents": chirp("latents", (2, 8, 4, 3)),
        "timesteps": np.asarray([731.5, 12.0], np.float32),
        "states": chirp("states", (2, 5, 6)),
        "pooled": chirp("pooled", (2, 5)),
    }


def torch_model(config: dict):
    """Diffusers' model with the formula's weights."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**config)
    fill(model)
    return model


def digest(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Two sums over each tensor, weighted by a formula, float32 [tensors in the order of names, 2]."""
    weights = {name: [chirp(f"{name} {i}", gradients[name].shape) for i in range(2)] for name in sorted(gradients)}
    return np.stack([[float(np.sum(gradients[n] * w)) for w in pair] for n, pair in weights.items()]).astype(np.float32)


def torch_numbers(model, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Prediction with the channels last, and gradients by name and of the `states`, by diffusers."""
    import torch

    states = torch.tensor(given["states"], requires_grad=True)
    found = model(
        hidden_states=torch.tensor(given["latents"]).permute(0, 3, 1, 2),
        encoder_hidden_states=states,
        pooled_projections=torch.tensor(given["pooled"]),
        timestep=torch.tensor(given["timesteps"]),
    ).sample.permute(0, 2, 3, 1)
    (found * torch.tensor(chirp("prediction", tuple(found.shape)))).sum().backward()
    gradients = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()}
    return {"prediction": found.detach().numpy(), "states": states.grad.numpy(), "gradients": gradients}


def published(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes by diffusers' own module on no device."""
    import torch
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    numbers = {v: torch_numbers(torch_model(config), inputs()) for v, config in VARIANTS.items()}
    kept = {
        f"{v}/{name}": digest(value) if name == "gradients" else value
        for v, values in numbers.items()
        for name, value in values.items()
    }
    np.savez_compressed(FOLDER / "expected.npz", **kept)
    write_published(FOLDER / "published.txt.gz", {name: published(config) for name, config in PUBLISHED.items()})
    print({file.name: file.stat().st_size for file in FOLDER.iterdir()})


if __name__ == "__main__":
    main()
