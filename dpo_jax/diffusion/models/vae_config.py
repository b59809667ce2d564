"""The shape of an autoencoder as data, in and out of the config.json of diffusers' AutoencoderKL."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo_jax.keys import WeightsError, flag, integer, number, optional, refuse


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder; names and defaults are diffusers'.

    Attributes:
      block_out_channels: channels at each resolution; every one but the last halves height and width.
      layers_per_block: residual blocks of the encoder at each resolution; the decoder has one more.
      sample_size: side of the images that a tile holds.
      scaling_factor, shift_factor, latents_mean, latents_std: of the latents (`vae.to_latents`).
      force_upcast: compute in float32, whatever type is asked for.
      use_quant_conv, use_post_quant_conv: a pointwise convolution behind the encoder and before the decoder.
      mid_block_add_attention: attention over all places of the lowest resolution.
      remat: keep only what enters each block for the backward pass.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    remat: bool = False

    @property
    def factor(self) -> int:
        """f, pixels of an image to a side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def config_from_dict(config: Mapping[str, Any], place: str = "config.json") -> AutoencoderConfig:
    """Config of an autoencoder from diffusers' config.json.

    Raises:
      WeightsError: another class of model, a feature that there is not here, or a key with a wrong value.
    """
    refuse(config, place, {"_class_name": "AutoencoderKL", "act_fn": "silu"})
    channels = _integers(config, place, "block_out_channels", [64])
    groups = integer(config, place, "norm_num_groups", 32)
    if odd := [n for n in channels if n % groups]:
        raise WeightsError(f"{place}: block_out_channels holds {odd[0]}, no multiple of norm_num_groups {groups}")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        refuse(config, place, {key: [kind] * len(channels)})
    latent_channels = integer(config, place, "latent_channels", 4)
    mean, std = (_numbers(config, place, key, latent_channels) for key in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise WeightsError(f"{place}: latents_mean and latents_std belong together; one of them is missing")
    size = config.get("sample_size")
    sizes = _integers(config, place, "sample_size", [32]) if isinstance(size, list | tuple) else ()
    return AutoencoderConfig(
        in_channels=integer(config, place, "in_channels", 3),
        out_channels=integer(config, place, "out_channels", 3),
        latent_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=integer(config, place, "layers_per_block", 1),
        norm_num_groups=groups,
        sample_size=sizes[0] if sizes else integer(config, place, "sample_size", 32),
        scaling_factor=number(config, place, "scaling_factor", 0.18215),
        shift_factor=optional(partial(number, above=-1e30), config, place, "shift_factor", None),
        latents_mean=mean,
        latents_std=std,
        force_upcast=flag(config, place, "force_upcast", True),
        use_quant_conv=flag(config, place, "use_quant_conv", True),
        use_post_quant_conv=flag(config, place, "use_post_quant_conv", True),
        mid_block_add_attention=flag(config, place, "mid_block_add_attention", True),
    )


def config_to_dict(config: AutoencoderConfig) -> dict[str, Any]:
    """The config.json of an autoencoder, as diffusers reads it."""
    blocks = len(config.block_out_channels)
    lists = {
        key: None if (values := getattr(config, key)) is None else list(values)
        for key in ("block_out_channels", "latents_mean", "latents_std")
    }
    plain = {
        key: getattr(config, key)
        for key in (
            *("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups", "sample_size"),
            *("scaling_factor", "shift_factor", "force_upcast", "use_quant_conv", "use_post_quant_conv"),
            "mid_block_add_attention",
        )
    }
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        **lists,
        **plain,
    }


def _integers(config: Mapping[str, Any], place: str, key: str, default: list[int]) -> tuple[int, ...]:
    values = default if config.get(key) is None else config[key]
    if not isinstance(values, list | tuple) or not values:
        raise WeightsError(f"{place}: {key} is {values!r}; expected a list of integers from 1")
    return tuple(integer({key: value}, place, key) for value in values)


def _numbers(config: Mapping[str, Any], place: str, key: str, count: int) -> tuple[float, ...] | None:
    values = config.get(key)
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != count:
        raise WeightsError(f"{place}: {key} is {values!r}; expected {count} numbers, one for each latent channel")
    return tuple(number({key: value}, place, key, above=-1e30) for value in values)
