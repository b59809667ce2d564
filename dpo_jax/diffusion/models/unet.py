"""The UNet of latent diffusion (Stable Diffusion 1, 2 and XL), in the layout of diffusers' UNet2DConditionModel.

Ronneberger et al. 2015, arXiv 1505.04597; Rombach et al. 2022, arXiv 2112.10752; Podell et al. 2023, arXiv 2307.01952.
What it predicts (noise, velocity) is its training's choice; small models for pixels are the same with small numbers.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.diffusion.models.layers import Conv, GroupNorm, timestep_embedding
from dpo_jax.diffusion.models.table import LINEAR, Place, table_of, tensor_shape
from dpo_jax.diffusion.models.unet_blocks import DownBlock, EmbeddingLayers, MiddleBlock, UpBlock, types_of
from dpo_jax.diffusion.models.unet_config import UNetConfig, config_from_dict, config_to_dict
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.functional import abstract_module, function_of, functional, set_adapters, shapes_of
from dpo_jax.lora import adapter_rules
from dpo_jax.sharding import BATCH_AXES, P, constrain
from dpo_jax.tree import named_leaves
from dpo_jax.types import Array, PyTree

__all__ = [
    "RULES",
    "UNet",
    "UNetConfig",
    "abstract_variables",
    "config_from_dict",
    "config_to_dict",
    "init_variables",
    "unet_function",
    "weight_table",
]

RULES = (
    (r"to_(q|k|v)/kernel$", P("fsdp", "model")),
    (r"to_out/0/kernel$", P("model", "fsdp")),
    (r"net/0/proj/kernel$", P("fsdp", "model")),
    (r"net/0/proj/bias$", P("model")),
    (r"net/2/kernel$", P("model", "fsdp")),
    (r"(proj_in|proj_out|time_emb_proj|linear_\d)/kernel$", P("fsdp", None)),
    (r"conv\w*/kernel$", P(None, None, None, "fsdp")),
)
RULES += adapter_rules(RULES)

_POINTWISE = re.compile(r"attentions/\d+/proj_(in|out)/kernel")
_TIME_WIDER = 4  # the time's embedding is so many times wider than the finest resolution


class UNet(nnx.Module):
    """Noisy latents, their timesteps and a text to what the model predicts."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        channels, types = config.block_out_channels, types_of(config)
        time_size, levels = _TIME_WIDER * channels[0], range(len(channels))
        self.config = config
        self.conv_in = Conv(config.in_channels, channels[0], types=types, rngs=rngs)
        self.time_embedding = EmbeddingLayers(channels[0], time_size, types=types, rngs=rngs)
        added = config.pooled_dim
        self.add_embedding = EmbeddingLayers(added, time_size, types=types, rngs=rngs) if added else None
        self.down_blocks = nnx.List([DownBlock(level, config, time_size, rngs=rngs) for level in levels])
        self.mid_block = MiddleBlock(config, time_size, rngs=rngs)
        self.up_blocks = nnx.List([UpBlock(number, config, time_size, rngs=rngs) for number in levels])
        norm = {"groups": config.norm_groups, "epsilon": config.norm_epsilon, "types": types}
        self.conv_norm_out = GroupNorm(channels[0], **norm)
        self.conv_out = Conv(channels[0], config.out_channels, types=types, rngs=rngs)

    def __call__(self, latents: Array, timesteps: Array, condition: TextCondition) -> Array:
        """What is predicted of the latents.

        Args:
          latents: [B, H, W, C].
          timesteps: [B], whole or fractional.
          condition: leaves lead with B; `pooled` and `sizes` are read by models that have a `size_embedding`.

        Returns:
          float32 [B, H, W, C].

        Raises:
          ValueError: a condition that lacks what the model reads.
        """
        time = jax.nn.silu(self._time(timesteps, condition))  # every residual block activates it
        condition = condition._replace(states=condition.states.astype(time.dtype))
        x = constrain(self.conv_in(latents), BATCH_AXES, None, None, None)
        kept = [x]
        for block in self.down_blocks:
            x, more = block(x, time, condition)
            kept += more
        x = self.mid_block(x, time, condition)
        for block in self.up_blocks:
            x = block(x, kept, time, condition)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))).astype(jnp.float32)

    def _time(self, timesteps: Array, condition: TextCondition) -> Array:
        """Timesteps, and for models that want them the pooled text and the sizes, [B, T]."""
        config = self.config
        how = {"flip": config.flip_sin_to_cos, "shift": config.freq_shift}
        time = self.time_embedding(timestep_embedding(timesteps, config.block_out_channels[0], **how))
        if self.add_embedding is None or config.size_embedding is None:
            return time
        pooled, sizes = condition.pooled, condition.sizes
        if pooled is None or sizes is None:
            missing = [name for name in ("pooled", "sizes") if getattr(condition, name) is None]
            raise ValueError(f"the condition has no {' and no '.join(missing)}, which this model reads")
        embedded = timestep_embedding(jnp.asarray(sizes).reshape(-1), config.size_embedding, **how)  # [B * N, E]
        added = jnp.concatenate([pooled.astype(jnp.float32), embedded.reshape(sizes.shape[0], -1)], axis=-1)
        if added.shape[-1] != config.pooled_dim:
            raise ValueError(
                f"pooled {pooled.shape} and sizes {sizes.shape}, {config.size_embedding} numbers for a size, make "
                f"{added.shape[-1]} numbers; this model reads {config.pooled_dim}"
            )
        return time + self.add_embedding(added)


def unet_function(config: UNetConfig, adapters: PyTree = None) -> Callable[..., Array]:
    """`predict(variables, latents, timesteps, condition)` of a config, without making any weights.

    Args:
      adapters: of the variables that the function will get (`dpo_jax.lora`), arrays or their shapes; None for the base.

    Raises:
      ValueError: an adapter of what is no linear layer.
    """
    if adapters is None:
        return function_of(UNet, config)
    model = abstract_module(UNet, config)
    set_adapters(model, adapters)
    return functional(model)[0]


def init_variables(config: UNetConfig, key: Array) -> PyTree:
    """Random weights: kernels uniform within 1 / sqrt(inputs), norms 1, biases 0."""
    return functional(UNet(config, rngs=nnx.Rngs(params=key)))[1]


def abstract_variables(config: UNetConfig) -> PyTree:
    """Shapes and dtypes of the variables, without making any."""
    return shapes_of(UNet, config)


def weight_table(config: UNetConfig) -> dict[str, Place]:
    """Variables -> tensors of diffusion_pytorch_model.safetensors."""
    variables = abstract_variables(config)
    table, leaves = table_of(variables), named_leaves(variables)
    if config.linear_projection:
        return table
    for path, place in table.items():
        if _POINTWISE.search(path):
            rows, columns = tensor_shape(place, leaves[path])
            table[path] = Place(place.name, LINEAR, (rows, columns, 1, 1))
    return table
