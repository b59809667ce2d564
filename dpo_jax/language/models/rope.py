"""Rotary positions: frequencies, their scaling to longer contexts, and the rotation of heads."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from dpo_jax.types import Array


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and their scaling to longer contexts.

    Attributes:
      theta: base of the frequencies.
      kind: "default", "linear" (positions divided by factor), "llama3" or "yarn" (arXiv 2309.00071).
      factor: how much longer the context becomes.
      original_length: context of the training before scaling (llama3, yarn).
      low_frequency_factor, high_frequency_factor: llama3's band between scaled and unscaled frequencies.
      beta_fast, beta_slow: yarn's band, in rotations over the original context.
      attention_factor: what cosine and sine are multiplied by (yarn).
      truncate: whether yarn rounds its band to whole dimensions.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of a head's dimensions, float32 [head_dim / 2]."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    base = config.theta**-exponent
    if config.kind == "linear":
        base = base / config.factor
    elif config.kind == "llama3":
        rotations = config.original_length * base / (2 * math.pi)
        low, high = config.low_frequency_factor, config.high_frequency_factor
        kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        base = kept * base + (1 - kept) * base / config.factor
    elif config.kind == "yarn":
        kept = 1 - _yarn_ramp(config, head_dim)
        base = kept * base + (1 - kept) * base / config.factor
    return base.astype(np.float32)


def _yarn_ramp(config: RopeConfig, head_dim: int) -> np.ndarray:
    """0 where a frequency is kept, 1 where it is divided by the factor, linear between; [head_dim / 2]."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(config.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    return np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)


def rotations(config: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine, float32 [R, L, 1, head_dim / 2], of path positions [R, L]."""
    angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(config, head_dim)
    return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotate the halves of each head's first dimensions against each other, computed in float32.

    Args:
      x: [R, L, H, head_dim].
      cosine, sine: float32 [R, L, 1, n]; the first 2 n dimensions are rotated, the others pass.
    """
    turned = 2 * cosine.shape[-1]
    first, second = jnp.split(x[..., :turned].astype(jnp.float32), 2, axis=-1)
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate([*(part.astype(x.dtype) for part in parts), x[..., turned:]], -1)
