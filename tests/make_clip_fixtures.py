"""What transformers' CLIP computes on tiny models, and the names of published ones: tests/fixtures/clip.

    python tests/make_clip_fixtures.py

expected.npz holds for each of `VARIANTS` what its towers say (fields of TextStates and VisionStates) and `gradients` of
a weighted sum of all of it, all tensors in the order of their names. Weights and inputs come from a formula.
published.txt.gz holds one line for each tensor of `PUBLISHED`, in the names of the files.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "diffusion"))
from formula_weights import chirp, fill, write_published

FOLDER = Path(__file__).parent / "fixtures" / "clip"
WORDS, END, LENGTH, SIDE = 20, 18, 7, 12


def sizes(hidden: int, inner: int, layers: int, heads: int, act: str, **keys) -> dict:
    """Keys that towers share."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        **keys,
    }


def one(architecture: str, kind: str, keys: dict, **more) -> dict:
    """config.json of one tower."""
    return {"architectures": [architecture], "model_type": f"clip_{kind}_model", **keys, **more}


def both(text: dict, vision: dict, projection: int) -> dict:
    """config.json of both towers."""
    parts = {"text_config": text, "vision_config": vision}
    parts = {name: {**part, "projection_dim": projection} for name, part in parts.items()}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": projection, **parts}


_WORDS = {"vocab_size": WORDS, "max_position_embeddings": 9, "pad_token_id": None, "bos_token_id": 17}
_PIXELS = {"image_size": SIDE, "patch_size": 4}
VARIANTS: dict[str, dict] = {
    "text": one("CLIPTextModel", "text", sizes(8, 12, 3, 2, "quick_gelu", **_WORDS, eos_token_id=2)),
    "text_projected": one(
        "CLIPTextModelWithProjection",
        "text",
        sizes(8, 12, 2, 4, "gelu", **_WORDS, eos_token_id=END),
        projection_dim=5,
    ),
    "vision": one("CLIPVisionModelWithProjection", "vision", sizes(8, 12, 2, 2, "gelu", **_PIXELS), projection_dim=5),
    "both": both(
        sizes(8, 12, 2, 2, "quick_gelu", **_WORDS, eos_token_id=END),
        sizes(12, 16, 2, 3, "quick_gelu", **_PIXELS),
        6,
    ),
}
_OLD = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2}
_L_TEXT = sizes(768, 3072, 12, 12, "quick_gelu", **_OLD)
_H_TEXT = sizes(1024, 4096, 24, 16, "gelu", **_OLD)
PUBLISHED: dict[str, dict] = {
    "sd15_text": one("CLIPTextModel", "text", _L_TEXT, projection_dim=768),
    "sd21_text": one("CLIPTextModel", "text", {**_H_TEXT, "num_hidden_layers": 23}, projection_dim=512),
    "sdxl_text_2": one(
        "CLIPTextModelWithProjection", "text", sizes(1280, 5120, 32, 20, "gelu", **_OLD), projection_dim=1280
    ),
    "clip_l14": both(_L_TEXT, sizes(1024, 4096, 24, 16, "quick_gelu", image_size=224, patch_size=14), 768),
    "clip_h14": both(_H_TEXT, sizes(1280, 5120, 32, 16, "gelu", image_size=224, patch_size=14), 1024),
}


def ids() -> np.ndarray:
    """int32 [3, L]: the end early and padded by itself, early and padded by zeros, last."""
    rows = np.floor((chirp("ids", (3, LENGTH)) + 1) / 2 * 15).astype(np.int32)
    rows[0, 3:], rows[1, 4], rows[1, 5:], rows[2, -1] = END, END, 0, END
    return rows


def images() -> np.ndarray:
    """float32 [2, H, W, 3]."""
    return chirp("images", (2, SIDE, SIDE, 3))


def make(config: dict):
    """transformers' module, its weights from the formula in the names of the files."""
    import transformers

    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    name = config["architectures"][0]
    base = {"clip": "CLIPConfig", "clip_text_model": "CLIPTextConfig", "clip_vision_model": "CLIPVisionConfig"}
    made = getattr(transformers, base[config["model_type"]])(**keys)
    return getattr(transformers, name)._from_config(made, attn_implementation="eager")


def file_name(config: dict, name: str) -> str:
    """The name in a file of a parameter: towers without projection have their prefix there."""
    prefix = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}
    return prefix.get(config["architectures"][0], "") + name


def torch_numbers(config: dict) -> dict[str, np.ndarray]:
    """States and gradients by transformers."""
    import torch

    model = make(config)
    fill(model, lambda name: file_name(config, name))
    found = {}
    if "text" in config["model_type"] or config["model_type"] == "clip":
        call = model.get_text_features if config["model_type"] == "clip" else model
        found |= states(model, "text", call(torch.tensor(ids(), dtype=torch.long), output_hidden_states=True))
    if "vision" in config["model_type"] or config["model_type"] == "clip":
        call = model.get_image_features if config["model_type"] == "clip" else model
        pixels = torch.tensor(images()).permute(0, 3, 1, 2)
        found |= states(model, "vision", call(pixels, output_hidden_states=True))
    if config["model_type"] == "clip":
        found["logit_scale"] = model.logit_scale
    sum((value * torch.tensor(chirp(name, tuple(value.shape)))).sum() for name, value in found.items()).backward()
    gradients = {file_name(config, name): p.grad.numpy().ravel() for name, p in model.named_parameters()}
    return {name: value.detach().numpy() for name, value in found.items()} | {
        "gradients": np.concatenate([gradients[name] for name in sorted(gradients)])
    }


def states(model, tower: str, output) -> dict:
    """Fields of TextStates or VisionStates that the output has; with a projection it stands for the pooled vector."""
    import torch

    found = {f"{tower}/layers": torch.stack(output.hidden_states)}
    if tower == "text":
        found["text/last"] = output.last_hidden_state
    projected = getattr(output, "text_embeds" if tower == "text" else "image_embeds", None)
    if projected is not None:
        found[f"{tower}/projected"] = projected
    elif hasattr(model, "visual_projection"):
        found[f"{tower}/projected"] = output.pooler_output
    else:
        found[f"{tower}/pooled"] = output.pooler_output
    return found


def published(config: dict) -> dict[str, tuple[int, ...]]:
    """Names in the file and shapes, by transformers' own module on no device."""
    import torch

    with torch.device("meta"):
        model = make(config)
    return {file_name(config, name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    numbers = {variant: torch_numbers(config) for variant, config in VARIANTS.items()}
    flat = {f"{v}/{name}": value for v, values in numbers.items() for name, value in values.items()}
    np.savez_compressed(FOLDER / "expected.npz", **flat)
    write_published(FOLDER / "published.txt.gz", {name: published(config) for name, config in PUBLISHED.items()})
    print({file.name: file.stat().st_size for file in FOLDER.iterdir()})


if __name__ == "__main__":
    main()
