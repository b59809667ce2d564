"""Scores of images as functions of CLIP's projected features, preferences made of them, and PickScore's training loss.

PickScore: Kirstain et al. 2023, arXiv 2305.01569. HPS v2: Wu et al. 2023, arXiv 2306.09341. CLIPScore: Hessel et al.
2021, arXiv 2104.08718. Aesthetic predictor: Schuhmann et al. 2022, arXiv 2210.08402. Evidence: official code.

    cos        = e_i . e_t / (|e_i| |e_t|)
    PickScore  = exp(logit_scale) cos;  HPS, CLIPScore = cos;  aesthetic = w . e_i / |e_i| + b

Features are [..., D] and broadcast: one text [P, 1, D] judges N images [P, N, D]. Scores are float32 of the leading
shape. The aesthetic head has five linear layers and nothing between them, so it is one affine map (`collapsed_head`).

>>> import jax.numpy as jnp
>>> pair = jnp.array([[[3.0, 4.0], [4.0, 3.0]]])
>>> text = jnp.array([[[0.0, 2.0]]])
>>> print((100 * hps_score(pair, text)).round(), pickscore(pair, text, jnp.log(100.0)).round())
[[80. 60.]] [[80. 60.]]
>>> out = pickscore_loss(scores=jnp.array([[1.0, 1.0]]), labels=jnp.array([[0.5, 0.5]]))
>>> round(float(out.loss[0]), 6)  # a tie that the scores say
0.0
"""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dpo_jax.ops import cosine_similarity, safe_divide
from dpo_jax.types import Array, LossOutput


def pickscore(image_features: Array, text_features: Array, logit_scale: Array | float) -> Array:
    """PickScore, about 18 to 24; the released model's exp(logit_scale) is 100."""
    return jnp.exp(logit_scale) * cosine_similarity(image_features, text_features)


def pickscore_probabilities(scores: Array) -> Array:
    """Probability of each image [..., N] of one prompt to be the preferred one."""
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1)


def hps_score(image_features: Array, text_features: Array) -> Array:
    """HPS v2 and v2.1 (other weights, not comparable), about 0.25 to 0.34; reports multiply by 100."""
    return cosine_similarity(image_features, text_features)


def clip_score(image_features: Array, text_features: Array) -> Array:
    """The cosine, about 0.2 to 0.4; papers say 100 times that, or `clipped_clip_score`."""
    return cosine_similarity(image_features, text_features)


def clipped_clip_score(image_features: Array, text_features: Array, *, weight: float = 2.5) -> Array:
    """CLIPScore as first published, weight * max(cos, 0)."""
    return weight * jax.nn.relu(cosine_similarity(image_features, text_features))


class AffineHead(NamedTuple):
    """A score of one vector: weight float32 [D], bias float32 []."""

    weight: np.ndarray
    bias: np.ndarray


def collapsed_head(layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> AffineHead:
    """One affine map for linear layers with nothing between them.

    Args:
      layers: weights [out, in], as torch has them, and biases [out]; the last has one output.

    Raises:
      ValueError: layers that do not fit each other, or more than one output.
    """
    weight, bias = np.eye(layers[0][0].shape[1]), np.zeros(layers[0][0].shape[1])
    for number, (matrix, shift) in enumerate(layers):
        if matrix.shape != (len(shift), len(bias)):
            raise ValueError(
                f"layer {number} of the head is {matrix.shape} with {len(shift)} biases, after {len(bias)}"
            )
        weight, bias = matrix.astype(np.float64) @ weight, matrix.astype(np.float64) @ bias + shift
    if len(bias) != 1:
        raise ValueError(f"the head has {len(bias)} outputs; a score is one")
    return AffineHead(weight[0].astype(np.float32), bias[0].astype(np.float32))


def aesthetic_score(image_features: Array, head: AffineHead) -> Array:
    """LAION's aesthetic score of an image, whatever it shows, about 4 to 7."""
    wide = image_features.astype(jnp.float32)
    unit = safe_divide(wide, jnp.linalg.norm(wide, axis=-1, keepdims=True))
    return jnp.sum(unit * head.weight, axis=-1) + head.bias


class Preference(NamedTuple):
    """The best and the worst of K images.

    Attributes:
      chosen, rejected: int32 [...], places of the largest and of the smallest score.
      decided: bool [...], whether they differ by more than the margin.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    decided: np.ndarray


def reward_to_preference(scores: ArrayLike, *, tie_margin: float = 0.0) -> Preference:
    """Pseudo-labels from scores [..., K], K at least 2; of equal scores the first is chosen and the last rejected.

    Raises:
      ValueError: fewer than two scores, scores that are no numbers, or a negative margin.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim < 1 or scores.shape[-1] < 2:
        raise ValueError(f"scores of shape {scores.shape}; a preference needs at least two images in the last axis")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} scores are no numbers; leave those images out")
    if not tie_margin >= 0:
        raise ValueError(f"tie_margin is {tie_margin}; give a number from 0")
    chosen = np.argmax(scores, axis=-1)
    rejected = scores.shape[-1] - 1 - np.argmin(scores[..., ::-1], axis=-1)
    decided = np.max(scores, axis=-1) - np.min(scores, axis=-1) > tie_margin
    return Preference(chosen.astype(np.int32), rejected.astype(np.int32), decided)


class Comparison(NamedTuple):
    """Shares of N comparisons; they sum to one.

    Attributes:
      wins, losses, ties: float64.
    """

    wins: float
    losses: float
    ties: float

    @property
    def half(self) -> float:
        """Win rate in which a tie is half a win."""
        return self.wins + self.ties / 2

    @property
    def decided(self) -> float:
        """Win rate among the decided ones; nan if there are none."""
        return self.wins / (self.wins + self.losses) if self.wins + self.losses else float("nan")


def win_rate(scores: ArrayLike, others: ArrayLike, *, tie_margin: float = 0.0) -> Comparison:
    """How often the first model's image beats the second's; [N] scores each, same prompts and seeds in both.

    Raises:
      ValueError: no scores, or different numbers of them.
    """
    gap = np.asarray(scores, np.float64) - np.asarray(others, np.float64) if _same(scores, others) else np.zeros(0)
    if not gap.size or np.isnan(gap).any():
        raise ValueError(f"{np.size(scores)} and {np.size(others)} scores; give as many of both, and numbers")
    wins, losses = float(np.mean(gap > tie_margin)), float(np.mean(gap < -tie_margin))
    return Comparison(wins, losses, float(np.mean(np.abs(gap) <= tie_margin)))


def _same(scores: ArrayLike, others: ArrayLike) -> bool:
    return np.shape(scores) == np.shape(others)


def pickscore_loss(*, scores: Array, labels: Array) -> LossOutput:
    """PickScore's training loss: KL from the labels to the softmax over a pair's scores (arXiv 2305.01569, eq. 2).

    The official code divides by the number of examples with the same prompt, and by the sum of those weights over the
    batch: give the rows of the batch the weight 1 / that number, and the train step's weighted mean is the same.

    Args:
      scores: [B, 2], `pickscore` of both images.
      labels: [B, 2], shares of preference: (1, 0), (0, 1), or (1/2, 1/2) for a tie; constants.

    Returns:
      loss float32 [B], at least 0; metrics `probability` of the preferred image (1/2 for ties), `margin` of the
      preferred image's score, and `accuracy` (strictly larger; 1/2 for ties).
    """
    chex.assert_equal_shape([scores, labels])
    chex.assert_shape(scores, (None, 2))
    labels = jax.lax.stop_gradient(labels.astype(jnp.float32))
    logps = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    positive = jnp.where(labels > 0, labels, 1.0)
    loss = jnp.sum(labels * (jnp.log(positive) - logps), axis=-1)
    sign = jnp.sign(labels[:, 0] - labels[:, 1])
    margin = jax.lax.stop_gradient(sign * (scores[:, 0] - scores[:, 1]).astype(jnp.float32))
    accuracy = jnp.where(sign == 0, 0.5, (margin > 0).astype(jnp.float32))
    return LossOutput(loss, {"probability": jax.nn.sigmoid(margin), "margin": margin, "accuracy": accuracy})
