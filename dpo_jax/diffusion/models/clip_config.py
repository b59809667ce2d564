"""Shapes of CLIP's towers, config.json in and out, and the sizes of released models that have no config.json.

Radford et al. 2021, arXiv 2103.00020; Cherti et al. 2022, arXiv 2212.07143 (OpenCLIP).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.keys import WeightsError, choice, integer, number, refuse

# Name in config.json -> name of the activation.
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
LEGACY_END = 2  # stands for "the largest id" in configs older than transformers 4.31


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower; defaults are transformers'.

    Attributes:
      positions: most tokens of a text.
      activation: `quick_gelu` (OpenAI) or `gelu` (OpenCLIP); the other one gives wrong features and no error.
      end_token: the first one in a row is where the text's vector is read; 2 stands for the largest id in the row.
    """

    vocabulary_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    layers: int = 12
    heads: int = 8
    positions: int = 77
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    end_token: int = 49407


@dataclass(frozen=True)
class VisionConfig:
    """Shape of an image tower; defaults are transformers', attributes as in `TextConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    layers: int = 12
    heads: int = 12
    channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    activation: str = "quick_gelu"
    epsilon: float = 1e-5


@dataclass(frozen=True)
class ClipConfig:
    """One tower or both.

    Attributes:
      text, vision: None for a model without that tower.
      projection: size of the space of both, or None for a tower without its projection.
      remat: keep only what enters each layer for the backward pass.
    """

    text: TextConfig | None = None
    vision: VisionConfig | None = None
    projection: int | None = None
    remat: bool = False


VIT_L_14 = ClipConfig(
    text=TextConfig(hidden_size=768, intermediate_size=3072, heads=12),
    vision=VisionConfig(hidden_size=1024, intermediate_size=4096, layers=24, heads=16, patch_size=14),
    projection=768,
)
VIT_H_14 = ClipConfig(
    text=TextConfig(hidden_size=1024, intermediate_size=4096, layers=24, heads=16, activation="gelu"),
    vision=VisionConfig(
        hidden_size=1280, intermediate_size=5120, layers=32, heads=16, patch_size=14, activation="gelu"
    ),
    projection=1024,
)

_TEXT, _VISION, _BOTH = "clip_text_model", "clip_vision_model", "clip"
# Architecture -> model type and whether there is a projection.
_ARCHITECTURES = {
    "CLIPTextModel": (_TEXT, False),
    "CLIPTextModelWithProjection": (_TEXT, True),
    "CLIPVisionModel": (_VISION, False),
    "CLIPVisionModelWithProjection": (_VISION, True),
    "CLIPModel": (_BOTH, True),
}


def config_from_dict(config: Mapping[str, Any], place: str = "config.json") -> ClipConfig:
    """Config of one tower or both from transformers' config.json.

    Raises:
      WeightsError: another architecture, a feature that there is not here, or a key with a wrong value.
    """
    names = config.get("architectures") or []
    known = [n for n in names if isinstance(n, str) and n in _ARCHITECTURES] if isinstance(names, list) else []
    if not known:
        raise WeightsError(f"{place}: architecture {names or 'not given'}; there is {', '.join(_ARCHITECTURES)}")
    kind, projected = _ARCHITECTURES[known[0]]
    text = vision = None
    if kind in (_TEXT, _BOTH):
        text = _text(_part(config, "text_config", place) if kind == _BOTH else config, place)
    if kind in (_VISION, _BOTH):
        vision = _vision(_part(config, "vision_config", place) if kind == _BOTH else config, place)
    return ClipConfig(text, vision, integer(config, place, "projection_dim", 512) if projected else None)


def _part(config: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any]:
    # In old files the second key, where it is not null, is what counts.
    part = config.get(f"{key}_dict") or config.get(key) or {}
    if not isinstance(part, Mapping):
        raise WeightsError(f"{place}: {key} is {part!r}; expected an object")
    return part


def _sizes(config: Mapping[str, Any], place: str, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    found = {
        "hidden_size": integer(config, place, "hidden_size", hidden),
        "intermediate_size": integer(config, place, "intermediate_size", inner),
        "layers": integer(config, place, "num_hidden_layers", 12),
        "heads": integer(config, place, "num_attention_heads", heads),
    }
    if found["hidden_size"] % found["heads"]:
        raise WeightsError(
            f"{place}: num_attention_heads is {found['heads']}; hidden_size {found['hidden_size']} is no multiple of it"
        )
    activation = choice(config, place, "hidden_act", "quick_gelu", _ACTIVATIONS)
    return {**found, "activation": activation, "epsilon": number(config, place, "layer_norm_eps", 1e-5)}


def _text(config: Mapping[str, Any], place: str) -> TextConfig:
    refuse(config, place, {"attention_dropout": 0.0, "dropout": 0.0})
    return TextConfig(
        vocabulary_size=integer(config, place, "vocab_size", 49408),
        positions=integer(config, place, "max_position_embeddings", 77),
        end_token=integer(config, place, "eos_token_id", 49407),
        **_sizes(config, place, 512, 2048, 8),
    )


def _vision(config: Mapping[str, Any], place: str) -> VisionConfig:
    refuse(config, place, {"attention_dropout": 0.0, "dropout": 0.0})
    image, patch = integer(config, place, "image_size", 224), integer(config, place, "patch_size", 32)
    if image < patch:
        raise WeightsError(f"{place}: patch_size is {patch}; an image of {image} pixels has no such patch")
    return VisionConfig(
        channels=integer(config, place, "num_channels", 3),
        image_size=image,
        patch_size=patch,
        **_sizes(config, place, 768, 3072, 12),
    )


def config_to_dict(config: ClipConfig) -> dict[str, Any]:
    """The config.json of a tower or both, as transformers reads it."""
    parts = {}
    if config.text is not None:
        parts["text_config"] = {
            "model_type": _TEXT,
            "vocab_size": config.text.vocabulary_size,
            "max_position_embeddings": config.text.positions,
            "eos_token_id": config.text.end_token,
            **_common_keys(config.text),
        }
    if config.vision is not None:
        parts["vision_config"] = {
            "model_type": _VISION,
            "num_channels": config.vision.channels,
            "image_size": config.vision.image_size,
            "patch_size": config.vision.patch_size,
            **_common_keys(config.vision),
        }
    kind = _BOTH if len(parts) == 2 else next(iter(parts.values()))["model_type"]
    wanted = (kind, config.projection is not None)
    found = [name for name, what in _ARCHITECTURES.items() if what == wanted]
    projection = {} if config.projection is None else {"projection_dim": config.projection}
    if kind == _BOTH:
        parts = {name: {**part, **projection} for name, part in parts.items()}
    else:
        parts = next(iter(parts.values()))
    return {**parts, **projection, "architectures": found, "model_type": kind}


def _common_keys(config: TextConfig | VisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": next(name for name, ours in _ACTIVATIONS.items() if ours == config.activation),
        "layer_norm_eps": config.epsilon,
    }
