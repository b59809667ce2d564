"""Online DPO (OAIF): at every step two fresh samples of the current policy, judged, and one step on the pair.

Guo et al. 2024, arXiv 2402.04792. Evidence: abstract and summaries, another library's trainer (loop, stopped gradients,
ties); how judges are freed of position bias is rebuilt. A step is

    two samples per prompt (temperature 0.9) from the current policy; masks up to and with the first end of text
    scores of a reward model, `penalise_missing_end`; or a judge, asked in both orders: `mean_judgement`
    `label_pairs`, then `order_pairs` on log-probabilities, masks and tokens alike
    `dpo_loss`, `ipo_sum_loss` or `hinge_loss` on the pair, weights times those of the labels and of `distinct`

Nothing is differentiated through sampling or judging: the policy's log-probabilities are computed once more, without
dropout. The reference stays the initial policy. Unlike in offline DPO the penalties change labels only, never ratios.

Shapes: scores [B, 2] of the two samples; results [B] float32 unless said otherwise.

>>> import jax.numpy as jnp
>>> labels = label_pairs(jnp.array([[0.2, 0.7], [1.0, 1.0]]))
>>> labels.chosen.tolist(), labels.weight.tolist()
([1, 0], [1.0, 0.0])
>>> f"{mean_judgement(jnp.array([0.9]), jnp.array([0.3]))[0]:.2f}"  # (0.9 + 1 - 0.3) / 2
'0.80'
"""

import math
from typing import NamedTuple

import chex
import jax.numpy as jnp

from dpo_jax.ops import require_between
from dpo_jax.types import Array


class PairLabels(NamedTuple):
    """Which of two samples is better.

    Attributes:
      chosen: int32 [B], 0 or 1; the other sample is rejected.
      weight: float32 [B], zero where the two are tied: such a pair carries no label. Whoever lets the first of equals
        win, as some trainers do, takes ones in its place.
    """

    chosen: Array
    weight: Array


def label_pairs(scores: Array) -> PairLabels:
    """The sample with the larger score is chosen; ties are dropped.

    Args:
      scores: [B, 2] of the two samples, rewards or a judge's probabilities (p, 1 - p).
    """
    chex.assert_shape(scores, (None, 2))
    first, second = scores[:, 0], scores[:, 1]
    return PairLabels((second > first).astype(jnp.int32), (first != second).astype(jnp.float32))


def order_pairs(values: Array, chosen: Array) -> tuple[Array, Array]:
    """(chosen, rejected), each [B, ...], of two samples' values [B, 2, ...]; `chosen` [B] is the index 0 or 1.

    Gradient flows through it, so it serves the policy's log-probabilities too.
    """
    chex.assert_equal_shape_prefix([values[:, 0, ...], chosen], 1)
    second = (chosen == 1).reshape(-1, *[1] * (values.ndim - 2))
    better = jnp.where(second, values[:, 1], values[:, 0])
    return better, jnp.where(second, values[:, 0], values[:, 1])


def penalise_missing_end(scores: Array, has_end: Array, *, penalty: float = 1.0) -> Array:
    """Scores less a penalty where a sample was cut off before its end of text, float32 [B, 2].

    Args:
      scores: [B, 2].
      has_end: [B, 2], not zero where the end of text was sampled; pairs without any are better dropped altogether.
      penalty: in units of the score, at least 0.
    """
    require_between(0.0, math.inf, penalty=penalty)
    chex.assert_equal_shape([scores, has_end])
    return scores.astype(jnp.float32) - penalty * (has_end == 0)


def distinct(tokens: Array, mask: Array) -> Array:
    """Float32 [B]: one where the two samples differ; equal ones have no gradient and would only thin the batch.

    Args:
      tokens: int [B, 2, T]; padding is not read.
      mask: [B, 2, T], not zero at sampled tokens.
    """
    chex.assert_equal_shape([tokens, mask])
    there = mask != 0
    differs = (there[:, 0] != there[:, 1]) | (there[:, 0] & (tokens[:, 0] != tokens[:, 1]))
    return differs.any(-1).astype(jnp.float32)


def mean_judgement(in_order: Array, swapped: Array) -> Array:
    """P(first sample better), float32, freed of position bias: mean of a judge's answers in both orders.

    Args:
      in_order: [...] probability that the answer shown first is better, with the first sample shown first.
      swapped: [...] the same with the second sample shown first.
    """
    chex.assert_equal_shape([in_order, swapped])
    return (in_order.astype(jnp.float32) + 1 - swapped.astype(jnp.float32)) / 2


def consistent_judgement(in_order: Array, swapped: Array) -> Array:
    """P(first sample better), float32 in {0, 1/2, 1}: 1/2 (a tie, so dropped) unless both orders name one winner.

    Args:
      in_order: [...] probability that the answer shown first is better, with the first sample shown first.
      swapped: [...] the same with the second sample shown first.
    """
    chex.assert_equal_shape([in_order, swapped])
    first = (in_order > 0.5) & (swapped < 0.5)
    second = (in_order < 0.5) & (swapped > 0.5)
    return jnp.where(first, 1.0, jnp.where(second, 0.0, 0.5)).astype(jnp.float32)
