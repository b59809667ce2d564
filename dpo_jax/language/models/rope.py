"""Rotary positions: frequencies, their scaling to longer contexts, and the rotation of heads."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.types import Array


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and their scaling to longer contexts.

    Attributes:
      theta: base of the frequencies.
      kind: "default", "linear" (positions divided by factor), "llama3", "yarn" (arXiv 2309.00071) or "longrope" (arXiv
        2402.13753).
      factor: how much longer the context becomes.
      original_length: context of the training before scaling (llama3, yarn, longrope).
      low_frequency_factor, high_frequency_factor: llama3's band between scaled and unscaled frequencies.
      beta_fast, beta_slow: yarn's band, in rotations over the original context.
      attention_factor: what cosine and sine are multiplied by (yarn, longrope).
      truncate: whether yarn rounds its band to whole dimensions.
      short_factors, long_factors: what longrope divides each frequency by, in sequences up to the original context and
        in longer ones.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


def rope_frequencies(config: RopeConfig, head_dim: int, *, long: bool = False) -> np.ndarray:
    """Radians per position of each pair of a head's dimensions, float32 [head_dim / 2].

    Args:
      long: those of sequences beyond the original context, where they differ (longrope).
    """
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
    elif config.kind == "longrope":
        base = base / np.array(config.long_factors if long else config.short_factors)
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


def rotations(config: RopeConfig, head_dim: int, positions: Array, long: Array | None = None) -> tuple[Array, Array]:
    """Cosine and sine, float32 [R, L, 1, head_dim / 2], of path positions [R, L].

    Args:
      long: bool [R, L], tokens of sequences beyond the original context; None for none.
    """
    frequencies = rope_frequencies(config, head_dim)
    if long is not None:
        frequencies = jnp.where(long[..., None, None], rope_frequencies(config, head_dim, long=True), frequencies)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * config.attention_factor, jnp.sin(angles) * config.attention_factor


def in_long_trees(positions: Array, subtree_end: Array, original_length: int) -> Array:
    """Tokens of trees of which a path is longer than the original context, bool [R, L].

    Each tree decides for itself, so that an example's numbers do not depend on those that share its batch, and all its
    paths alike, because they share their prompt. (transformers decides for a whole call, by the longest of its rows.)

    Args:
      positions, subtree_end: int32 [R, L] of rows of trees in depth-first order; a tree begins where a position is 0,
        and padding has an end of 0.
    """
    tree = jnp.cumsum(positions == 0, axis=1)
    late = ((positions >= original_length) & (subtree_end > 0)).astype(tree.dtype)
    # Largest within the tree, from the left and from the right: numbers of other trees lie below.
    before = jax.lax.cummax(2 * tree + late, axis=1) - 2 * tree
    behind = jax.lax.cummax(late - 2 * tree, axis=1, reverse=True) + 2 * tree
    return before + behind > 0


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
