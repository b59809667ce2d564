"""The shape of a UNet as data, in and out of the config.json of diffusers' UNet2DConditionModel."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dpo_jax.keys import WeightsError, flag, integer, number, optional, refuse

_DOWN, _DOWN_ATTENTION = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _UP_ATTENTION = "UpBlock2D", "CrossAttnUpBlock2D"
_MIDDLE = "UNetMidBlock2DCrossAttn"
# Features that the UNet lacks, as key -> the value that leaves them out.
_USUAL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "mid_block_type": _MIDDLE,
    "center_input_sample": False,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
}


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet, and how it runs; defaults are those of Stable Diffusion 1.5.

    Attributes:
      in_channels, out_channels: of the latents, and of what is predicted.
      block_out_channels: channels of each resolution, from the finest on; each but the last halves height and width.
      layers: residual blocks of each resolution on the way down; there is one more on the way up.
      down_attention, up_attention: which resolutions have transformers, in the order in which they are passed.
      transformer_layers: blocks of each transformer of a resolution, by the order of the way down.
      heads: of each resolution's attention, likewise.
      cross_attention_dim: D of the text's states.
      linear_projection: transformers are entered and left by a linear layer, which the checkpoint otherwise keeps as a
        pointwise convolution; the same function.
      norm_groups, norm_epsilon: of the group norms.
      flip_sin_to_cos, freq_shift: of the embedding of timesteps (`timestep_embedding`).
      size_embedding: size of the embedding of each of the condition's `sizes`, or None for models without `pooled` and
        `sizes` (diffusers calls this addition_time_embed_dim).
      pooled_dim: P + the number of sizes times `size_embedding` (projection_class_embeddings_input_dim), or None.
      sample_size: side of the latents that the model was made for; written back only.
      upcast_attention: written back only, as softmax is always float32 here.
      dtype: type of the computation; norms, softmax, embeddings of timesteps and what is predicted are float32.
      param_dtype: type of the parameters.
      remat: "full" keeps only what enters each residual and each transformer block for the backward pass.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: tuple[int, ...] = (2, 2, 2, 2)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    transformer_layers: tuple[int, ...] = (1, 1, 1, 1)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    size_embedding: int | None = None
    pooled_dim: int | None = None
    sample_size: int | None = 64
    upcast_attention: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        count = len(self.block_out_channels)
        for name in ("layers", "down_attention", "up_attention", "transformer_layers", "heads"):
            if len(value := getattr(self, name)) != count:
                raise ValueError(f"{name} is {value}; there are {count} resolutions")
        for channels, heads in zip(self.block_out_channels, self.heads):
            if channels % self.norm_groups or channels % heads:
                raise ValueError(
                    f"block_out_channels holds {channels}; expected a multiple of {self.norm_groups} groups of the "
                    f"norms and of {heads} heads"
                )
        if self.block_out_channels[0] % 2:
            raise ValueError(f"block_out_channels starts with {self.block_out_channels[0]}; expected an even number")
        if (self.size_embedding is None) != (self.pooled_dim is None):
            raise ValueError("size_embedding and pooled_dim belong together; one of them is missing")


def _integers(config: Mapping[str, Any], place: str, key: str, default: Any, count: int) -> tuple[int, ...]:
    """One integer for all resolutions, or one for each."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, list | tuple):
        return (integer(config, place, key, default),) * count
    if len(value) != count:
        raise WeightsError(f"{place}: {key} is {list(value)}; expected {count} integers")
    return tuple(integer({key: one}, place, key) for one in value)


def _blocks(config: Mapping[str, Any], place: str, key: str, plain: str, attention: str) -> tuple[bool, ...]:
    """Which resolutions have attention."""
    defaults = {
        "down_block_types": [_DOWN_ATTENTION] * 3 + [_DOWN],
        "up_block_types": [_UP] + [_UP_ATTENTION] * 3,
    }
    kinds = defaults[key] if config.get(key) is None else config[key]
    if not isinstance(kinds, list | tuple) or any(kind not in (plain, attention) for kind in kinds):
        raise WeightsError(f"{place}: {key} is {kinds!r}; there is {plain}, {attention}")
    return tuple(kind == attention for kind in kinds)


def config_from_dict(config: Mapping[str, Any], place: str = "config.json") -> UNetConfig:
    """UNet config of a checkpoint's config.json, as Stable Diffusion 1, 2 and XL have it.

    Raises:
      WeightsError: a feature that the UNet does not have, or a key that is wrong.
    """
    refuse(config, place, _USUAL)
    down = _blocks(config, place, "down_block_types", _DOWN, _DOWN_ATTENTION)
    up = _blocks(config, place, "up_block_types", _UP, _UP_ATTENTION)
    count = len(down)
    channels = config.get("block_out_channels")
    if len(up) != count or not count or (isinstance(channels, list | tuple) and len(channels) != count):
        raise WeightsError(
            f"{place}: {count} down_block_types, {len(up)} up_block_types, block_out_channels {channels}"
        )
    kind = config.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise WeightsError(f"{place}: addition_embed_type is {kind!r}; there is text_time")
    sized = kind == "text_time"
    read = partial(_integers, config, place, count=count)
    size = config.get("sample_size")
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise WeightsError(f"{place}: sample_size is {list(size)}; expected one integer")
        size = size[0]
    try:
        return UNetConfig(
            in_channels=integer(config, place, "in_channels", 4),
            out_channels=integer(config, place, "out_channels", 4),
            block_out_channels=read("block_out_channels", (320, 640, 1280, 1280)),
            layers=read("layers_per_block", 2),
            down_attention=down,
            up_attention=up,
            transformer_layers=read("transformer_layers_per_block", 1),
            heads=read("attention_head_dim", 8),  # diffusers' name for the number of heads
            cross_attention_dim=_one(read("cross_attention_dim", 1280), place, "cross_attention_dim"),
            linear_projection=flag(config, place, "use_linear_projection", False),
            norm_groups=integer(config, place, "norm_num_groups", 32),
            norm_epsilon=number(config, place, "norm_eps", 1e-5),
            flip_sin_to_cos=flag(config, place, "flip_sin_to_cos", True),
            freq_shift=number(config, place, "freq_shift", 0.0, above=-1e9),
            size_embedding=integer(config, place, "addition_time_embed_dim") if sized else None,
            pooled_dim=integer(config, place, "projection_class_embeddings_input_dim") if sized else None,
            sample_size=optional(integer, {"sample_size": size}, place, "sample_size", None),
            upcast_attention=flag(config, place, "upcast_attention", False),
        )
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{place}: {error}") from error


def _one(values: tuple[int, ...], place: str, key: str) -> int:
    if len(set(values)) != 1:
        raise WeightsError(f"{place}: {key} is {list(values)}; expected one for all resolutions")
    return values[0]


def config_to_dict(config: UNetConfig) -> dict[str, Any]:
    """The config.json that diffusers reads."""
    even = len(set(config.layers)) == 1
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": None if config.size_embedding is None else "text_time",
        "addition_time_embed_dim": config.size_embedding,
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": [_DOWN_ATTENTION if has else _DOWN for has in config.down_attention],
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": int(config.freq_shift) if config.freq_shift.is_integer() else config.freq_shift,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers[0] if even else list(config.layers),
        "mid_block_type": _MIDDLE,
        "norm_eps": config.norm_epsilon,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_channels,
        "projection_class_embeddings_input_dim": config.pooled_dim,
        "sample_size": config.sample_size,
        "transformer_layers_per_block": list(config.transformer_layers),
        "up_block_types": [_UP_ATTENTION if has else _UP for has in config.up_attention],
        "upcast_attention": config.upcast_attention,
        "use_linear_projection": config.linear_projection,
    }
