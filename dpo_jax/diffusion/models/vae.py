"""The autoencoder of latent diffusion (Stable Diffusion 1, 2, XL and 3), in the layout of diffusers' AutoencoderKL.

Rombach et al. 2022, arXiv 2112.10752. Images are [B, H, W, 3] in [-1, 1]; latents [B, H / f, W / f, C]. What the
encoder says (`Posterior`) and what the decoder takes are unscaled; a diffusion model sees `to_latents` of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.diffusion.models.layers import Conv, GroupNorm, Linear, Types, attend
from dpo_jax.diffusion.models.table import Place, table_of
from dpo_jax.diffusion.models.vae_config import AutoencoderConfig, config_from_dict, config_to_dict
from dpo_jax.functional import function_of, functional, shapes_of
from dpo_jax.sharding import BATCH_AXES, P, constrain
from dpo_jax.types import Array, PyTree

__all__ = [
    "RULES",
    "Autoencoder",
    "AutoencoderConfig",
    "Posterior",
    "abstract_variables",
    "autoencoder_function",
    "config_from_dict",
    "config_to_dict",
    "from_latents",
    "init_variables",
    "sample_posterior",
    "to_latents",
    "weight_table",
]

# The autoencoder is small and frozen: its kernels are split over fsdp, and no head or hidden unit over model.
RULES = (
    (r"to_(q|k|v|out/0)/kernel$", P("fsdp")),
    (r"kernel$", P(None, None, "fsdp")),
)

_FLOAT32 = Types()
_EPSILON = 1e-6  # of the norms
_OVERLAP = 4  # neighbouring tiles share a fourth of their sides
# Attention in files of early releases.
_OLD_NAMES = ((r"to_q$", "query"), (r"to_k$", "key"), (r"to_v$", "value"), (r"to_out/0$", "proj_attn"))


class Posterior(NamedTuple):
    """The encoder's Gaussian over latents; mean and log-variance float32 [B, H / f, W / f, C], not scaled."""

    mean: Array
    log_variance: Array


def sample_posterior(key: Array, posterior: Posterior) -> Array:
    """Latents drawn from the encoder's Gaussian, float32 and not scaled."""
    noise = jax.random.normal(key, posterior.mean.shape, jnp.float32)
    return posterior.mean + jnp.exp(posterior.log_variance / 2) * noise


def to_latents(config: AutoencoderConfig, unscaled: Array) -> Array:
    """What a diffusion model sees of unscaled latents: (z - shift or mean) scale (/ std)."""
    mean, scale = _affine(config)
    return (unscaled - mean) * scale


def from_latents(config: AutoencoderConfig, latents: Array) -> Array:
    """What the decoder takes, from a diffusion model's latents; the inverse of `to_latents`."""
    mean, scale = _affine(config)
    return latents / scale + mean


def _affine(config: AutoencoderConfig) -> tuple[Array | float, Array | float]:
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (jnp.asarray(values, jnp.float32) for values in (config.latents_mean, config.latents_std))
        return mean, config.scaling_factor / std
    return config.shift_factor or 0.0, config.scaling_factor


class ResidualBlock(nnx.Module):
    """Two normed convolutions beside a skip, which is projected where the number of channels changes."""

    def __init__(self, size_in: int, size_out: int, *, groups: int, types: Types, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(size_in, groups=groups, epsilon=_EPSILON, types=types)
        self.conv1 = Conv(size_in, size_out, types=types, rngs=rngs)
        self.norm2 = GroupNorm(size_out, groups=groups, epsilon=_EPSILON, types=types)
        self.conv2 = Conv(size_out, size_out, types=types, rngs=rngs)
        same = size_in == size_out
        self.conv_shortcut = None if same else Conv(size_in, size_out, window=1, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """One head over all places of an image, added to it."""

    def __init__(self, channels: int, *, groups: int, types: Types, rngs: nnx.Rngs):
        linear = partial(Linear, channels, channels, types=types, rngs=rngs)
        self.group_norm = GroupNorm(channels, groups=groups, epsilon=_EPSILON, types=types)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])

    def __call__(self, x: Array) -> Array:
        flat = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])  # [B, h, w, C] -> [B, h w, 1, C]
        seen = attend(self.to_q(flat), self.to_k(flat), self.to_v(flat))
        return x + self.to_out[0](seen).reshape(x.shape)


class Downsample(nnx.Module):
    """A convolution of stride two; the padding stands behind the last row and column only."""

    def __init__(self, channels: int, *, types: Types, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, stride=2, padding=(0, 1), types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel four times, and a convolution."""

    def __init__(self, channels: int, *, types: Types, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Resolution(nnx.Module):
    """Residual blocks at one resolution, and the way to the next, if there is one."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        blocks: int,
        down: bool,
        last: bool,
        groups: int,
        types: Types,
        rngs: nnx.Rngs,
    ):
        sizes = [size_in] + [size_out] * (blocks - 1)
        self.resnets = nnx.List([ResidualBlock(n, size_out, groups=groups, types=types, rngs=rngs) for n in sizes])
        further = Downsample if down else Upsample
        change = nnx.List([] if last else [further(size_out, types=types, rngs=rngs)])
        if down:
            self.downsamplers = change
        else:
            self.upsamplers = change

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        for further in self.downsamplers if hasattr(self, "downsamplers") else self.upsamplers:
            x = further(x)
        return x


class Middle(nnx.Module):
    """Two residual blocks at the lowest resolution with attention between them."""

    def __init__(self, channels: int, config: AutoencoderConfig, *, types: Types, rngs: nnx.Rngs):
        common: dict[str, Any] = {"groups": config.norm_num_groups, "types": types, "rngs": rngs}
        self.resnets = nnx.List([ResidualBlock(channels, channels, **common) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, **common)] if config.mid_block_add_attention else [])

    def __call__(self, x: Array) -> Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Tower(nnx.Module):
    """What encoder and decoder share: a convolution at each end, a norm before the last."""

    def __init__(self, size_in: int, first: int, last: int, size_out: int, groups: int, types: Types, rngs: nnx.Rngs):
        self.conv_in = Conv(size_in, first, types=types, rngs=rngs)
        self.conv_norm_out = GroupNorm(last, groups=groups, epsilon=_EPSILON, types=types)
        self.conv_out = Conv(last, size_out, types=types, rngs=rngs)

    def run(self, x: Array, blocks: list[nnx.Module], remat: bool) -> Array:
        x = self.conv_in(constrain(x, BATCH_AXES))
        for block in blocks:
            x = constrain(jax.checkpoint(block, prevent_cse=False)(x) if remat else block(x), BATCH_AXES)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Encoder(_Tower):
    """Images to mean and log-variance, side by side in the channels."""

    def __init__(self, config: AutoencoderConfig, *, types: Types, rngs: nnx.Rngs):
        sizes, groups = config.block_out_channels, config.norm_num_groups
        super().__init__(config.in_channels, sizes[0], sizes[-1], 2 * config.latent_channels, groups, types, rngs)
        before = (sizes[0], *sizes[:-1])
        common: dict[str, Any] = {"groups": groups, "types": types, "rngs": rngs, "blocks": config.layers_per_block}
        self.down_blocks = nnx.List(
            [
                Resolution(n_in, n_out, down=True, last=number == len(sizes) - 1, **common)
                for number, (n_in, n_out) in enumerate(zip(before, sizes))
            ]
        )
        self.mid_block = Middle(sizes[-1], config, types=types, rngs=rngs)
        self.remat = config.remat

    def __call__(self, images: Array) -> Array:
        return self.run(images, [*self.down_blocks, self.mid_block], self.remat)


class Decoder(_Tower):
    """Latents to images."""

    def __init__(self, config: AutoencoderConfig, *, types: Types, rngs: nnx.Rngs):
        sizes, groups = config.block_out_channels[::-1], config.norm_num_groups
        super().__init__(config.latent_channels, sizes[0], sizes[-1], config.out_channels, groups, types, rngs)
        before = (sizes[0], *sizes[:-1])
        common: dict[str, Any] = {"groups": groups, "types": types, "rngs": rngs, "blocks": config.layers_per_block + 1}
        self.mid_block = Middle(sizes[0], config, types=types, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Resolution(n_in, n_out, down=False, last=number == len(sizes) - 1, **common)
                for number, (n_in, n_out) in enumerate(zip(before, sizes))
            ]
        )
        self.remat = config.remat

    def __call__(self, latents: Array) -> Array:
        return self.run(latents, [self.mid_block, *self.up_blocks], self.remat)


class Autoencoder(nnx.Module):
    """Encoder and decoder."""

    def __init__(self, config: AutoencoderConfig, *, types: Types = _FLOAT32, rngs: nnx.Rngs):
        if config.force_upcast:
            types = types._replace(compute=jnp.float32)
        channels = config.latent_channels
        pointwise = partial(Conv, window=1, types=types, rngs=rngs)
        self.config = config
        self.encoder = Encoder(config, types=types, rngs=rngs)
        self.decoder = Decoder(config, types=types, rngs=rngs)
        self.quant_conv = pointwise(2 * channels, 2 * channels) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(channels, channels) if config.use_post_quant_conv else None

    def encode(self, images: Array) -> Posterior:
        """The Gaussian over latents of images [B, H, W, 3] in [-1, 1]; H and W are multiples of f."""
        return _posterior(self._moments(images))

    def decode(self, latents: Array) -> Array:
        """Images float32 [B, H, W, 3], about in [-1, 1], of unscaled latents (`from_latents`)."""
        hidden = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        return self.decoder(hidden).astype(jnp.float32)

    def tiled_encode(self, images: Array, tile: int | None = None) -> Posterior:
        """As `encode`, tile by tile, so that memory does not grow with the image; seams are blended.

        Args:
          images: larger than a tile, or they are encoded as a whole.
          tile: side of a tile in pixels, a multiple of 4 f; that of the config by default.

        Raises:
          ValueError: a side that tiles cannot have.
        """
        tile = self._tile(tile)
        return _posterior(_tiled(self._moments, images, tile, tile // self.config.factor))

    def tiled_decode(self, latents: Array, tile: int | None = None) -> Array:
        """As `decode`, tile by tile; arguments as in `tiled_encode`."""
        tile = self._tile(tile)
        return _tiled(self.decode, latents, tile // self.config.factor, tile)

    def __call__(self, images: Array) -> Array:
        """Images from the mean of their latents."""
        return self.decode(self.encode(images).mean)

    def _moments(self, images: Array) -> Array:
        hidden = self.encoder(images)
        return hidden if self.quant_conv is None else self.quant_conv(hidden)

    def _tile(self, tile: int | None) -> int:
        tile, step = tile or self.config.sample_size, _OVERLAP * self.config.factor
        if tile < 1 or tile % step:
            raise ValueError(f"tiles have a side of {tile} pixels; give a multiple of {step}")
        return tile


def _posterior(moments: Array) -> Posterior:
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))


def _tiled(function: Callable[[Array], Array], x: Array, before: int, after: int) -> Array:
    """The function on tiles of side `before`, which become `after`, blended where they overlap."""
    if max(x.shape[1:3]) <= before:
        return function(x)
    step, extent = before - before // _OVERLAP, after // _OVERLAP
    starts = [range(0, size, step) for size in x.shape[1:3]]
    # Tiles at the lower and right edges are smaller. Those of a size go one after another through one program.
    together: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    pieces = {(i, j): x[:, i : i + before, j : j + before] for i in starts[0] for j in starts[1]}
    for place, piece in pieces.items():
        together.setdefault(piece.shape, []).append(place)
    done: dict[tuple[int, int], Array] = {}
    for places in together.values():
        done |= dict(zip(places, jax.lax.map(function, jnp.stack([pieces[place] for place in places]))))
    rows = []
    for i in starts[0]:
        for j in starts[1]:
            if i:
                done[i, j] = _blended(done[i - step, j], done[i, j], extent, 1)
            if j:
                done[i, j] = _blended(done[i, j - step], done[i, j], extent, 2)
        kept = after - extent
        rows.append(jnp.concatenate([done[i, j][:, :kept, :kept] for j in starts[1]], axis=2))
    return jnp.concatenate(rows, axis=1)


def _blended(earlier: Array, later: Array, extent: int, axis: int) -> Array:
    """The later tile, whose first rows or columns fade in over the last ones of the earlier tile."""
    extent = min(earlier.shape[axis], later.shape[axis], extent)
    take = partial(jax.lax.slice_in_dim, axis=axis)
    shape = [1] * later.ndim
    shape[axis] = extent
    rate = (jnp.arange(extent, dtype=later.dtype) / extent).reshape(shape)
    size = earlier.shape[axis]
    seam = take(earlier, size - extent, size) * (1 - rate) + take(later, 0, extent) * rate
    return jnp.concatenate([seam, take(later, extent, later.shape[axis])], axis=axis)


def autoencoder_function(config: AutoencoderConfig, types: Types = _FLOAT32) -> Callable[..., Any]:
    """`apply_fn(variables, x, method="encode")` (or decode, tiled_encode, tiled_decode), without making any weights."""
    return function_of(Autoencoder, config, types=types)


def init_variables(config: AutoencoderConfig, key: Array, types: Types = _FLOAT32) -> PyTree:
    """Random weights."""
    return functional(Autoencoder(config, types=types, rngs=nnx.Rngs(params=key)))[1]


def abstract_variables(config: AutoencoderConfig, types: Types = _FLOAT32) -> PyTree:
    """Shapes and dtypes of the variables, without making any."""
    return shapes_of(Autoencoder, config, types=types)


def weight_table(config: AutoencoderConfig, *, old_names: bool = False) -> dict[str, Place]:
    """Path name of a variable -> place in diffusion_pytorch_model.safetensors.

    Args:
      old_names: of attention, as files of early releases have them (`...attentions.0.query.weight`).
    """
    return table_of(abstract_variables(config), _OLD_NAMES if old_names else ())
