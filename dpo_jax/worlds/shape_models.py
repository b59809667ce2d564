"""A small diffusion model of the shapes world: UNet and caption encoder, trained from scratch, kept as a pipeline.

The model is one of pixels, where what a pipeline's folder calls `vae` is not there, or of the latents of an autoencoder
(`halving`). Captions are read by a small CLIP text tower whose tokenizer has a token for each word of the world.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.models import clip, clip_config, unet, unet_config, vae, vae_config
from dpo_jax.diffusion.models.clip_config import ClipConfig, TextConfig
from dpo_jax.diffusion.models.unet_config import UNetConfig
from dpo_jax.diffusion.models.vae_config import AutoencoderConfig
from dpo_jax.diffusion.models.weights import DIFFUSERS, TRANSFORMERS, save_model
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.sharding import Rules
from dpo_jax.types import Array, PyTree
from dpo_jax.worlds.shapes import CAPTION_LENGTH, SIZE, WORDS

START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH = 64  # of the caption's states

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "clip_sample": False,
}


def clip_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and merges, of a byte-level BPE in CLIP's form in which each word is one token."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, list(merges)


def write_clip_tokenizer(folder: Path, words: Iterable[str], *, length: int, pad: str = END) -> dict[str, int]:
    """Write a CLIP tokenizer in which each word is one token; token -> id."""
    vocabulary, merges = clip_vocabulary(words)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    write_json(folder / "tokenizer_config.json", settings)
    return vocabulary


def write_json(file: Path, value: Any) -> None:
    """Write a file of JSON, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def caption_words() -> tuple[str, ...]:
    """The words of the world."""
    return WORDS[3:]


def text_config() -> ClipConfig:
    """Of the caption encoder."""
    vocabulary, _ = clip_vocabulary(caption_words())
    tower = TextConfig(
        vocabulary_size=len(vocabulary),
        positions=CAPTION_LENGTH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        layers=2,
        heads=4,
        activation="gelu",
        end_token=vocabulary[END],
    )
    return ClipConfig(text=tower)


def denoiser_config(channels: Sequence[int] = (16, 48, 96), *, size: int = SIZE) -> UNetConfig:
    """Of the UNet for latents of a size; the coarsest resolution sees the caption."""
    count = len(channels)
    seeing = tuple(level == count - 1 for level in range(count))
    return UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(channels),
        layers=(1,) * count,
        down_attention=seeing,
        up_attention=seeing[::-1],
        transformer_layers=(1,) * count,
        heads=(1, *(max(1, c // 24) for c in channels[1:])),
        cross_attention_dim=WIDTH,
        norm_groups=8,
        sample_size=size,
    )


def token_ids(captions: Sequence[str]) -> np.ndarray:
    """Token ids of captions, int32 [N, CAPTION_LENGTH], as the pipeline's tokenizer makes them; "" is the empty one."""
    vocabulary, _ = clip_vocabulary(caption_words())
    start, end = vocabulary[START], vocabulary[END]
    rows = [[start, *(vocabulary[f"{word}</w>"] for word in caption.split()), end] for caption in captions]
    return np.array([row + [end] * (CAPTION_LENGTH - len(row)) for row in rows], np.int32)


def init_variables(config: UNetConfig, key: Array) -> PyTree:
    """Random weights of UNet and caption encoder, `{"unet", "text_encoder"}`."""
    keys = jax.random.split(key)
    return {
        "unet": unet.init_variables(config, keys[0]),
        "text_encoder": clip.init_variables(text_config(), keys[1]),
    }


def joint_function(config: UNetConfig) -> Callable[..., Array]:
    """`predict(variables, latents [B, H, W, 3], timesteps [B], ids [B, L])` of UNet and encoder trained together."""
    denoiser, encoder = unet.unet_function(config), clip.clip_function(text_config())

    def predict(variables: PyTree, latents: Array, timesteps: Array, ids: Array) -> Array:
        states = encoder(variables["text_encoder"], ids, method="text").last
        return denoiser(variables["unet"], latents, timesteps, TextCondition(states))

    return predict


RULES: Rules = tuple((f"unet/.*{pattern}", spec) for pattern, spec in unet.RULES)


def save_shape_pipeline(
    folder: Path, config: UNetConfig, variables: PyTree, autoencoder: AutoencoderConfig | None = None
) -> Path:
    """Write UNet and caption encoder as a diffusers folder; the folder.

    Args:
      variables: `{"unet", "text_encoder"}`, and `"vae"` where there is an autoencoder.
      autoencoder: of the latents that the UNet was trained on; None for pixels.
    """
    text = text_config()
    parts = [
        ("unet", unet.weight_table(config), unet_config.config_to_dict(config), DIFFUSERS),
        ("text_encoder", clip.weight_table(text), clip_config.config_to_dict(text), TRANSFORMERS),
    ]
    if autoencoder is not None:
        parts.append(("vae", vae.weight_table(autoencoder), vae_config.config_to_dict(autoencoder), DIFFUSERS))
    for part, table, keys, stem in parts:
        save_model(folder / part, jax.tree.map(jnp.asarray, variables[part]), table, keys, stem=stem)
    write_clip_tokenizer(folder / "tokenizer", caption_words(), length=CAPTION_LENGTH)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.31.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [None, None] if autoencoder is None else ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    write_json(folder / "model_index.json", index)
    return folder
