"""What a UNet is built of: residual blocks, transformers over places and text, resolutions on the way down and up.

Names are those of diffusers' modules. Images are [B, H, W, C]; inside a transformer they are [B, H W, C].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.diffusion.models.layers import Conv, GroupNorm, LayerNorm, Linear, Types, attend, split_heads
from dpo_jax.diffusion.models.unet_config import UNetConfig
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, constrain
from dpo_jax.types import Array

_TRANSFORMER_EPSILON = 1e-6  # of the group norm before a transformer
_WIDER = 4  # the feed-forward part is so many times wider


def types_of(config: UNetConfig) -> Types:
    """Types of the modules."""
    return Types(jnp.dtype(config.dtype), jnp.dtype(config.param_dtype))


def _run(remat: str, block: Any, *inputs: Any) -> Any:
    """A block, of which the backward pass keeps only the inputs if asked."""
    return jax.checkpoint(block)(*inputs) if remat == "full" else block(*inputs)


def _spread(x: Array) -> Array:
    return constrain(x, BATCH_AXES, *(None,) * (x.ndim - 1))


class EmbeddingLayers(nnx.Module):
    """An embedding (of a timestep, of sizes) made as wide as the residual blocks expect."""

    def __init__(self, size_in: int, size_out: int, *, types: Types, rngs: nnx.Rngs):
        self.linear_1 = Linear(size_in, size_out, types=types, rngs=rngs)
        self.linear_2 = Linear(size_out, size_out, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResidualBlock(nnx.Module):
    """Two normed convolutions with the time between them, added to the input (to its projection, if wider)."""

    def __init__(self, size_in: int, size_out: int, time_size: int, config: UNetConfig, *, rngs: nnx.Rngs):
        types = types_of(config)
        norm = {"groups": config.norm_groups, "epsilon": config.norm_epsilon, "types": types}
        self.norm1 = GroupNorm(size_in, **norm)
        self.conv1 = Conv(size_in, size_out, types=types, rngs=rngs)
        self.time_emb_proj = Linear(time_size, size_out, types=types, rngs=rngs)
        self.norm2 = GroupNorm(size_out, **norm)
        self.conv2 = Conv(size_out, size_out, types=types, rngs=rngs)
        other = size_in != size_out
        self.conv_shortcut = Conv(size_in, size_out, window=1, types=types, rngs=rngs) if other else None

    def __call__(self, x: Array, time: Array) -> Array:
        """x [B, H, W, C]; time [B, T], activated."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = y + self.time_emb_proj(time)[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return _spread(y + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Attention(nnx.Module):
    """Heads over the places themselves, or over the text's states; [B, L, C] -> [B, L, C]."""

    def __init__(self, size: int, size_seen: int, heads: int, *, types: Types, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = Linear(size, size, bias=False, types=types, rngs=rngs)
        self.to_k = Linear(size_seen, size, bias=False, types=types, rngs=rngs)
        self.to_v = Linear(size_seen, size, bias=False, types=types, rngs=rngs)
        self.to_out = nnx.List([Linear(size, size, types=types, rngs=rngs)])

    def __call__(self, x: Array, seen: Array, mask: Array | None = None) -> Array:
        """x [B, L, C]; seen [B, S, C or D]; mask bool [B, S]."""
        query, key, value = (
            split_heads(to(given), self.heads) for to, given in ((self.to_q, x), (self.to_k, seen), (self.to_v, seen))
        )
        return self.to_out[0](attend(query, key, value, mask=mask))


class GatedProjection(nnx.Module):
    """One projection twice as wide: a value, and a gate that is activated by GELU (arXiv 2002.05202)."""

    def __init__(self, size_in: int, size_out: int, *, types: Types, rngs: nnx.Rngs):
        self.proj = Linear(size_in, 2 * size_out, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return constrain(value * jax.nn.gelu(gate, approximate=False), BATCH_AXES, None, MODEL_AXIS)


class FeedForward(nnx.Module):
    """Gated feed-forward part; place 1 of `net` is the checkpoint's dropout."""

    def __init__(self, size: int, *, types: Types, rngs: nnx.Rngs):
        inner = GatedProjection(size, _WIDER * size, types=types, rngs=rngs)
        self.net: Any = nnx.List([inner, None, Linear(_WIDER * size, size, types=types, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Attention over places, attention over the text, feed-forward; each normed before and added."""

    def __init__(self, size: int, heads: int, config: UNetConfig, *, rngs: nnx.Rngs):
        types = types_of(config)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(size, types=types) for _ in range(3))
        self.attn1 = Attention(size, size, heads, types=types, rngs=rngs)
        self.attn2 = Attention(size, config.cross_attention_dim, heads, types=types, rngs=rngs)
        self.ff = FeedForward(size, types=types, rngs=rngs)

    def __call__(self, x: Array, states: Array, mask: Array | None) -> Array:
        near = self.norm1(x)
        x = _spread(x + self.attn1(near, near))
        x = _spread(x + self.attn2(self.norm2(x), states, mask))
        return _spread(x + self.ff(self.norm3(x)))


class Transformer(nnx.Module):
    """Transformer blocks over the places of an image, added to it."""

    def __init__(self, size: int, heads: int, count: int, config: UNetConfig, *, rngs: nnx.Rngs):
        types = types_of(config)
        self.remat = config.remat
        self.norm = GroupNorm(size, groups=config.norm_groups, epsilon=_TRANSFORMER_EPSILON, types=types)
        self.proj_in = Linear(size, size, types=types, rngs=rngs)
        self.transformer_blocks = nnx.List([TransformerBlock(size, heads, config, rngs=rngs) for _ in range(count)])
        self.proj_out = Linear(size, size, types=types, rngs=rngs)

    def __call__(self, x: Array, condition: TextCondition) -> Array:
        y = self.proj_in(self.norm(x).reshape(x.shape[0], -1, x.shape[-1]))  # [B, H, W, C] -> [B, H W, C]
        for block in self.transformer_blocks:
            y = _run(self.remat, block, y, condition.states, condition.mask)
        return _spread(x + self.proj_out(y).reshape(x.shape))


class Downsample(nnx.Module):
    """Half the height and width, rounded up."""

    def __init__(self, channels: int, *, types: Types, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """The nearest place's values at another height and width, convolved."""

    def __init__(self, channels: int, *, types: Types, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, types=types, rngs=rngs)

    def __call__(self, x: Array, height: int, width: int) -> Array:
        batch, h, w, channels = x.shape
        if (height, width) == (2 * h, 2 * w):
            x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, h, 2, w, 2, channels))
            return self.conv(x.reshape(batch, height, width, channels))
        rows, columns = jnp.arange(height) * h // height, jnp.arange(width) * w // width
        return self.conv(x[:, rows][:, :, columns])


class DownBlock(nnx.Module):
    """One resolution on the way down; all that its layers give is kept for the way up."""

    def __init__(self, level: int, config: UNetConfig, time_size: int, *, rngs: nnx.Rngs):
        channels, types = config.block_out_channels, types_of(config)
        self.remat = config.remat
        size, last = channels[level], level == len(channels) - 1
        sizes = [channels[max(level - 1, 0)]] + [size] * (config.layers[level] - 1)
        self.resnets = nnx.List([ResidualBlock(size_in, size, time_size, config, rngs=rngs) for size_in in sizes])
        self.attentions = _transformers(level, len(sizes), config.down_attention[level], config, rngs)
        self.downsamplers = nnx.List([] if last else [Downsample(size, types=types, rngs=rngs)])

    def __call__(self, x: Array, time: Array, condition: TextCondition) -> tuple[Array, list[Array]]:
        kept = []
        for number, resnet in enumerate(self.resnets):
            x = _run(self.remat, resnet, x, time)
            if self.attentions:
                x = self.attentions[number](x, condition)
            kept.append(x)
        for downsampler in self.downsamplers:
            x = _spread(downsampler(x))
            kept.append(x)
        return x, kept


class MiddleBlock(nnx.Module):
    """The coarsest resolution: a transformer between two residual blocks."""

    def __init__(self, config: UNetConfig, time_size: int, *, rngs: nnx.Rngs):
        self.remat = config.remat
        size = config.block_out_channels[-1]
        self.resnets = nnx.List([ResidualBlock(size, size, time_size, config, rngs=rngs) for _ in range(2)])
        self.attentions = _transformers(len(config.heads) - 1, 1, True, config, rngs)

    def __call__(self, x: Array, time: Array, condition: TextCondition) -> Array:
        x = _run(self.remat, self.resnets[0], x, time)
        x = self.attentions[0](x, condition)
        return _run(self.remat, self.resnets[1], x, time)


class UpBlock(nnx.Module):
    """One resolution on the way up; each layer also sees what a layer on the way down gave."""

    def __init__(self, number: int, config: UNetConfig, time_size: int, *, rngs: nnx.Rngs):
        channels, types = config.block_out_channels, types_of(config)
        self.remat = config.remat
        level = len(channels) - 1 - number
        size, finer, count = channels[level], channels[max(level - 1, 0)], config.layers[level] + 1
        below = [channels[min(level + 1, len(channels) - 1)]] + [size] * (count - 1)
        beside = [size] * (count - 1) + [finer]
        self.resnets = nnx.List(
            [ResidualBlock(a + b, size, time_size, config, rngs=rngs) for a, b in zip(below, beside)]
        )
        self.attentions = _transformers(level, count, config.up_attention[number], config, rngs)
        self.upsamplers = nnx.List([Upsample(size, types=types, rngs=rngs)] if level else [])

    def __call__(self, x: Array, kept: list[Array], time: Array, condition: TextCondition) -> Array:
        """Takes what it uses off the end of `kept`."""
        for number, resnet in enumerate(self.resnets):
            x = _run(self.remat, resnet, jnp.concatenate([x, kept.pop()], axis=-1), time)
            if self.attentions:
                x = self.attentions[number](x, condition)
        for upsampler in self.upsamplers:
            x = _spread(upsampler(x, *kept[-1].shape[1:3]))
        return x


def _transformers(level: int, count: int, has: bool, config: UNetConfig, rngs: nnx.Rngs) -> nnx.List:
    size, heads, blocks = config.block_out_channels[level], config.heads[level], config.transformer_layers[level]
    return nnx.List([Transformer(size, heads, blocks, config, rngs=rngs) for _ in range(count if has else 0)])
