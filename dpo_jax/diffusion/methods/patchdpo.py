"""PatchDPO: patches of personalised images are kept where they are good and learnt from the reference image elsewhere.

Huang et al. 2024, "PatchDPO: Patch-level DPO for Finetuning-free Personalized Image Generation", arXiv 2412.03177
(CVPR 2025). Evidence: loss and data layout from the official code, patch quality from a public summary.

    q_gen[h, w] = max_ij cos(f(x_gen)[h, w], f(x_ref)[i, j]),  q_ref the other way round, in [0, 1]
    loss = mean over both images and all elements of w (prediction - target)^2
           w = 1 - q_ref at the entity (reference) image,  w = q_gen at the generated one

Both images share timestep and noise. There is no reference model, no sigmoid and no negative weight: in spite of its
name the published objective is a weighted regression. Quality 1 everywhere is half the error of the generated image,
quality 0 half that of the entity's (fine-tuning).

>>> import jax.numpy as jnp
>>> maps, quality = jnp.ones((1, 2, 2)), jnp.array([[[1.0, 0.5], [0.0, 0.5]]])
>>> out = patchdpo_loss(policy_entity_error_map=2 * maps, policy_generated_error_map=maps,
...                     entity_quality=quality, generated_quality=quality)
>>> float(out.loss[0])
0.75
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import safe_divide
from dpo_jax.types import Array, LossOutput


class PatchMatch(NamedTuple):
    """How well each patch of an image is found in another.

    Attributes:
      quality: float32 [..., H, W] in [0, 1].
      place: int32 [..., H, W], row-major index of the best patch of the other image.
    """

    quality: Array
    place: Array


def patch_quality(features: Array, other: Array) -> PatchMatch:
    """Largest cosine of each patch's features with those of the other image's patches, cut off at 0.

    Args:
      features: [..., H, W, D] of the image in question.
      other: [..., I, J, D] of the image to look in.
    """

    def directions(x: Array) -> Array:
        x = x.astype(jnp.float32).reshape(*x.shape[:-3], -1, x.shape[-1])  # [..., H W, D]
        x = safe_divide(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True))  # squares of large features leave float32
        return safe_divide(x, jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)))

    cosines = jnp.einsum("...pd,...qd->...pq", directions(features), directions(other))
    shape = features.shape[:-1]
    best = jnp.clip(jnp.max(cosines, axis=-1), 0.0, 1.0)
    return PatchMatch(best.reshape(shape), jnp.argmax(cosines, axis=-1).astype(jnp.int32).reshape(shape))


def resize_map(quality: Array, height: int, width: int, method: str = "nearest") -> Array:
    """Maps [..., H, W] at another size, float32; `method` is jax.image.resize's ("nearest", "bilinear")."""
    resized = jax.image.resize(quality.astype(jnp.float32), (*quality.shape[:-2], height, width), method)
    return jnp.clip(resized, 0.0, 1.0)


def patchdpo_loss(
    *,
    policy_entity_error_map: Array,
    policy_generated_error_map: Array,
    entity_quality: Array,
    generated_quality: Array,
) -> LossOutput:
    """The loss of PatchDPO.

    Args:
      policy_entity_error_map, policy_generated_error_map: [B, H, W] squared errors, means over channels.
      entity_quality, generated_quality: [B, H, W] in [0, 1] at the size of the latents; constants.

    Returns:
      loss float32 [B], the mean over both images and all places; `entity_loss` and `generated_loss` are its two halves,
      `entity_quality` and `generated_quality` mean qualities.
    """
    chex.assert_equal_shape([policy_entity_error_map, policy_generated_error_map, entity_quality, generated_quality])
    entity_weight, generated_weight = (
        jax.lax.stop_gradient(w.astype(jnp.float32))
        for w in (1 - entity_quality.astype(jnp.float32), generated_quality)
    )
    axes = tuple(range(1, entity_quality.ndim))
    entity = 0.5 * jnp.mean(entity_weight * policy_entity_error_map.astype(jnp.float32), axis=axes)
    generated = 0.5 * jnp.mean(generated_weight * policy_generated_error_map.astype(jnp.float32), axis=axes)
    metrics = {
        "entity_loss": entity,
        "generated_loss": generated,
        "entity_quality": 1 - jnp.mean(entity_weight, axis=axes),
        "generated_quality": jnp.mean(generated_weight, axis=axes),
    }
    return LossOutput(entity + generated, jax.lax.stop_gradient(metrics))
