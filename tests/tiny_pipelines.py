"""Tiny random pipelines in diffusers' layout, made with the library's own writers and without torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.models import clip, clip_config, mmdit, unet, unet_config, vae
from dpo_jax.diffusion.models.clip_config import ClipConfig, TextConfig
from dpo_jax.diffusion.models.folder import Kind
from dpo_jax.diffusion.models.mmdit_config import MMDiTConfig
from dpo_jax.diffusion.models.unet_config import UNetConfig
from dpo_jax.diffusion.models.vae import AutoencoderConfig
from dpo_jax.diffusion.models.weights import DIFFUSERS, TRANSFORMERS, save_model
from dpo_jax.tree import map_named
from dpo_jax.types import PyTree
from dpo_jax.worlds.shape_models import END, clip_vocabulary, write_clip_tokenizer, write_json

WORDS = ("a", "the", "red", "green", "blue", "yellow", "circle", "square", "triangle", "small", "large", "and", "of")
LENGTH = 12  # tokens of a prompt
CLASSES: dict[Kind, str] = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
}
# Of the published models, but for keys that say nothing.
SCHEDULERS: dict[Kind, dict[str, Any]] = {
    "sd": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    },
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "sd3": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}


def make_tiny_pipeline(
    folder: Path, kind: Kind, *, words: Iterable[str] = WORDS, scale: float = 1.0, seed: int = 0
) -> Path:
    """Write a pipeline with random weights, of images of 16 pixels and latents of 8.

    Args:
      words: that are one token each; others are spelled.
      scale: of the kernels, over the root of their number of inputs.
    """
    vocabulary, _ = clip_vocabulary(words)
    encoders = _encoders(kind, vocabulary)
    autoencoder = AutoencoderConfig(
        block_out_channels=(4, 8),
        latent_channels=16 if kind == "sd3" else 4,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor={"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305}[kind],
        shift_factor=0.0609 if kind == "sd3" else None,
        force_upcast=False,
        use_quant_conv=kind != "sd3",
        use_post_quant_conv=kind != "sd3",
    )
    denoiser = _denoiser(kind, encoders)
    model, read = (mmdit, mmdit) if kind == "sd3" else (unet, unet_config)
    name = "transformer" if kind == "sd3" else "unet"
    parts: list[tuple[str, Any, Any, Any, str]] = [
        (name, model, read.config_to_dict(denoiser), denoiser, DIFFUSERS),
        ("vae", vae, vae.config_to_dict(autoencoder), autoencoder, DIFFUSERS),
    ]
    for number, config in enumerate(encoders):
        suffix = f"_{number + 1}" if number else ""
        parts.append((f"text_encoder{suffix}", clip, clip_config.config_to_dict(config), config, TRANSFORMERS))
        # The second tokenizer fills up with the first word, as the published ones do.
        pad = "!" if number else END
        write_clip_tokenizer(folder / f"tokenizer{suffix}", words, length=LENGTH, pad=pad)
    for number, (part, module, keys, config, stem) in enumerate(parts):
        variables = random_variables(module.abstract_variables(config), scale=scale, seed=seed + number)
        if kind == "sd3" and part == name:
            variables["pos_embed"]["pos_embed"] = mmdit.position_table(denoiser)
        save_model(folder / part, variables, module.weight_table(config), keys, stem=stem)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS[kind])
    write_json(folder / "model_index.json", _index(kind, [part for part, *_ in parts]))
    return folder


def random_variables(abstract: PyTree, *, scale: float = 1.0, seed: int = 0) -> PyTree:
    """Kernels and embeddings normal, scales 1, biases 0; nothing is compiled."""
    rng = np.random.default_rng(seed)

    def one(name: str, leaf) -> Any:
        kind = name.rsplit("/", 1)[-1]
        if kind in ("scale", "bias"):
            return jnp.full(leaf.shape, float(kind == "scale"), leaf.dtype)
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) == 4 else leaf.shape[-2] if kind == "kernel" else 25
        return jnp.asarray(rng.normal(size=leaf.shape) * scale / np.sqrt(inputs), leaf.dtype)

    return map_named(one, abstract)


def _encoders(kind: Kind, vocabulary: dict[str, int]) -> tuple[ClipConfig, ...]:
    common: dict[str, Any] = {"vocabulary_size": len(vocabulary), "positions": LENGTH, "end_token": vocabulary[END]}
    common |= {"layers": 2, "heads": 2, "intermediate_size": 16}
    first = TextConfig(hidden_size=8, **common)
    if kind == "sd":
        return (ClipConfig(text=first),)
    second = TextConfig(hidden_size=12, activation="gelu", **common)
    return ClipConfig(text=first, projection=8 if kind == "sd3" else None), ClipConfig(text=second, projection=12)


def _denoiser(kind: Kind, encoders: tuple[ClipConfig, ...]) -> Any:
    width = sum(config.text.hidden_size for config in encoders if config.text)
    pooled = sum(config.projection or 0 for config in encoders)
    if kind == "sd3":
        return MMDiTConfig(
            sample_size=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=width + 4,
            pooled_projection_dim=pooled,
            pos_embed_max_size=6,
        )
    sized: dict[str, Any] = {"size_embedding": 4, "pooled_dim": pooled + 24} if kind == "sdxl" else {}
    return UNetConfig(
        block_out_channels=(8, 16),
        layers=(1, 1),
        down_attention=(kind == "sd", True),
        up_attention=(True, kind == "sd"),
        transformer_layers=(1, 1),
        heads=(2, 2),
        cross_attention_dim=width,
        linear_projection=kind == "sdxl",
        norm_groups=4,
        sample_size=8,
        **sized,
    )


def _index(kind: Kind, parts: list[str]) -> dict[str, Any]:
    name, _, *encoders = parts
    projected = {"text_encoder": kind == "sd3", "text_encoder_2": True}
    models = {n: "CLIPTextModel" + ("WithProjection" if projected[n] else "") for n in encoders}
    index: dict[str, Any] = {
        "_class_name": CLASSES[kind],
        "_diffusers_version": "0.31.0",
        name: ["diffusers", "SD3Transformer2DModel" if kind == "sd3" else "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", SCHEDULERS[kind]["_class_name"]],
        **{n: ["transformers", model] for n, model in models.items()},
        **{n.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for n in encoders},
    }
    nothing = [None, None]
    if kind == "sd":
        return {**index, "safety_checker": nothing, "feature_extractor": nothing, "requires_safety_checker": False}
    if kind == "sdxl":
        return {**index, "force_zeros_for_empty_prompt": True}
    return {**index, "text_encoder_3": nothing, "tokenizer_3": nothing}
