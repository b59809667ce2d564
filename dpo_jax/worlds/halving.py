"""An autoencoder that is written down, not trained: latents are images of half the side.

Its layout is that of diffusers' AutoencoderKL, so that a small latent model of the shapes world is a pipeline like any
other. The encoder averages each two by two pixels, the decoder doubles the averages and smooths them; both are linear
but for a part in ten thousand, by two identities:

- silu(x) - silu(-x) = x: where channels carry x and -x, the last layers undo their non-linearity;
- the norm before it divides by the deviation of all channels. Those of x and -x have no mean, and two constant ones of
  +-PILLAR hold the deviation where it is, whatever the image.

Residual blocks add nothing. Pixels are counted from the world's ground, which is what stands beyond the borders. Of 300
true images the judge accepts 0.91 after both ways, and the saturation that it reads is off by 0.025 (`tests/worlds`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.models import vae
from dpo_jax.diffusion.models.vae_config import AutoencoderConfig
from dpo_jax.tree import map_named
from dpo_jax.types import PyTree
from dpo_jax.worlds.shapes import GROUND, SIZE

PILLAR = 256.0
COLOURS = 3
WIDTH = 2 * COLOURS + 2  # x, -x, +PILLAR, -PILLAR
_SURE = -30.0  # log-variance of latents that are not drawn
_BETWEEN = (0.15, 0.7, 0.15)  # of doubled pixels; a quarter would be linear interpolation, which blurs more


def halving_config(size: int = SIZE) -> AutoencoderConfig:
    """Of images of a size, whose latents have half of it and three channels."""
    return AutoencoderConfig(
        latent_channels=COLOURS,
        block_out_channels=(WIDTH, WIDTH),
        norm_num_groups=1,
        sample_size=size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def halving_variables() -> PyTree:
    """Weights of the autoencoder, float32; they do not depend on the size."""
    eye = np.eye(COLOURS)
    spread = np.concatenate([eye, -eye, np.zeros((COLOURS, 2))], axis=1)  # [3, 8]: x -> x, -x, 0, 0
    gather = np.concatenate([eye, -eye, np.zeros((2, COLOURS))])  # [8, 3]: silu of these -> x
    pillars = np.array([*[0.0] * (2 * COLOURS), PILLAR, -PILLAR])
    keep, moving = np.eye(WIDTH), np.diag(pillars == 0).astype(float)
    whole = np.concatenate([gather, np.zeros_like(gather)], axis=1)
    pixels = np.zeros((3, 3, 1, 1))
    pixels[:2, :2] = 1 / 4  # the padding of this convolution stands behind the image
    between = np.outer(_BETWEEN, _BETWEEN)[:, :, None, None]
    written = {
        "encoder/conv_in/kernel": _centre(spread),
        "encoder/conv_in/bias": pillars - GROUND * spread.sum(0),
        "encoder/down_blocks/0/downsamplers/0/conv/kernel": pixels * keep,
        "encoder/conv_out/kernel": _centre(whole),
        "encoder/conv_out/bias": np.array([GROUND] * COLOURS + [_SURE] * COLOURS),
        "decoder/conv_in/kernel": _centre(spread),
        "decoder/conv_in/bias": pillars - GROUND * spread.sum(0),
        "decoder/up_blocks/0/upsamplers/0/conv/kernel": between * moving,
        "decoder/up_blocks/0/upsamplers/0/conv/bias": pillars,
        "decoder/conv_out/kernel": _centre(gather),
        "decoder/conv_out/bias": np.full(COLOURS, GROUND),
        "quant_conv/kernel": np.eye(2 * COLOURS)[None, None],
        "post_quant_conv/kernel": eye[None, None],
    }
    deviation = PILLAR * (2 / WIDTH) ** 0.5
    for tower in ("encoder", "decoder"):
        written[f"{tower}/conv_norm_out/scale"] = np.full(WIDTH, deviation)

    def leaf(name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        value = written.pop(name, np.zeros(abstract.shape))
        return jnp.asarray(np.broadcast_to(value, abstract.shape), jnp.float32)

    variables = map_named(leaf, vae.abstract_variables(halving_config()))
    assert not written
    return variables


def latents_of(images: np.ndarray, *, batch_size: int = 500) -> np.ndarray:
    """Latents float32 [N, H / 2, W / 2, 3] of images float32 [N, H, W, 3] in [-1, 1]."""
    config, variables = halving_config(), halving_variables()
    encode = jax.jit(partial(vae.autoencoder_function(config), variables, method="encode"))
    parts = [encode(images[start : start + batch_size]).mean for start in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(vae.to_latents(config, part)) for part in parts])


def _centre(matrix: np.ndarray) -> np.ndarray:
    """A convolution [3, 3, in, out] that looks at its own pixel alone."""
    kernel = np.zeros((3, 3, *matrix.shape))
    kernel[1, 1] = matrix
    return kernel
