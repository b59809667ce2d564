"""The shape of Stable Diffusion 3's transformer as data, in and out of the config.json that diffusers writes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax.numpy as jnp

from dpo_jax.diffusion.models.layers import Types
from dpo_jax.keys import WeightsError, integer, refuse

_SIZES = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
}
_OTHERS = ("out_channels", "caption_projection_dim", "dual_attention_layers", "qk_norm")


@dataclass(frozen=True)
class MMDiTConfig:
    """Shape of the transformer; names and defaults are diffusers'.

    Attributes:
      sample_size: side of the latents whose positions are one apart.
      num_attention_heads, attention_head_dim: their product is the width D.
      joint_attention_dim: width of the text states.
      pooled_projection_dim: width of the text's one vector.
      pos_embed_max_size: side of the table of positions in patches, of which smaller images get the middle.
      dual_blocks: number of blocks, from the first, with a second attention.
      qk_norm: norm queries and keys.
      dtype: type of the computation; norms, softmax, embeddings of timesteps and what is predicted are float32.
      param_dtype: type of the parameters.
      remat: "full" keeps only what enters each block for the backward pass.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_blocks: int = 0
    qk_norm: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full"] = "none"

    @property
    def width(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def types(self) -> Types:
        """Of computation and parameters."""
        return Types(jnp.dtype(self.dtype), jnp.dtype(self.param_dtype))

    @property
    def stacks(self) -> dict[str, range]:
        """Numbers of the blocks that are stacked, by the name of the stack."""
        return {"dual_blocks": range(self.dual_blocks), "blocks": range(self.dual_blocks, self.num_layers - 1)}


def config_from_dict(config: Mapping[str, Any], place: str = "config.json") -> MMDiTConfig:
    """Config of a transformer from diffusers' config.json.

    Raises:
      WeightsError: another class of model, a feature that there is not here, or a key with a wrong value.
    """
    refuse(config, place, {"_class_name": "SD3Transformer2DModel"})
    if unknown := [key for key in config if not key.startswith("_") and key not in (*_SIZES, *_OTHERS)]:
        raise WeightsError(f"{place}: {', '.join(unknown)}: keys that this model does not have")
    sizes: dict[str, Any] = {key: integer(config, place, key, default) for key, default in _SIZES.items()}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    if (given := integer(config, place, "caption_projection_dim", 1152)) != width:
        raise WeightsError(f"{place}: caption_projection_dim is {given}; expected heads times their size, {width}")
    if width % 4:
        raise WeightsError(
            f"{place}: num_attention_heads times attention_head_dim is {width}; expected a multiple of 4"
        )
    dual, norm = config.get("dual_attention_layers") or [], config.get("qk_norm")
    if not isinstance(dual, list | tuple) or list(dual) != list(range(len(dual))) or len(dual) >= sizes["num_layers"]:
        raise WeightsError(f"{place}: dual_attention_layers is {dual!r}; expected 0, 1, ..., before the last layer")
    if norm not in (None, "rms_norm"):
        raise WeightsError(f"{place}: qk_norm is {norm!r}; there is null and 'rms_norm'")
    out_channels = integer(config, place, "out_channels", 16 if "out_channels" not in config else sizes["in_channels"])
    return MMDiTConfig(**sizes, out_channels=out_channels, dual_blocks=len(dual), qk_norm=norm is not None)


def config_to_dict(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json of a config."""
    sizes = {key: value for key, value in asdict(config).items() if key in (*_SIZES, "out_channels")}
    return {
        "_class_name": "SD3Transformer2DModel",
        **sizes,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(range(config.dual_blocks)),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }
