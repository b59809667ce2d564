"""More is Less: where chosen and rejected answers come from, and how easily the two are told apart.

Wang et al. 2025, arXiv 2504.02193. Evidence: official code for the recipes, the sampling settings and the reward
model; the probe is reconstructed from the paper's claim.

    recipe          chosen                             rejected                 here
    HC+Self         the dataset's chosen               own greedy sample        make_preference_pairs
    GPT4o+Self      another model's answer             own greedy sample        make_preference_pairs
    Stronger+Self   larger model of the family         own greedy sample        make_preference_pairs
    Self+RM         best of 5 own samples by reward    the worst of them        self_ranked_pairs
    pool with RM    of two sources the one rewarded    the other                pool_ranked_pairs
                    more; the stronger one on ties

    probe           min_{w, b} mean log loss of sigma(w f + b), chosen 1, rejected 0, + (l2/2) |w|^2
    gap             sqrt(d' S^-1 d), d difference of the class means, S mean of the class covariances + eps I

The loss is `dpo_loss`. Pairs of several models are separable by style alone: DPO's loss collapses and safety suffers;
high accuracy of the probe on held-out pairs is the warning. Own samples: temperature 0.5, top-p 0.9, repetition penalty
1.2, 128 tokens. Success rates of attacks are in `safety_eval`. Rows are plain dicts and run on the host; pooling is
JAX, hidden states [B, T, D], masks [B, T]; the probe is float64 NumPy.

>>> self_ranked_pairs(["q"], [["short", "a good one", "bad one"]], [[0.0, 2.0, -1.0]])
[{'prompt': 'q', 'chosen': 'a good one', 'rejected': 'bad one', 'chosen_source': 'self', 'rejected_source': 'self'}]
>>> probe = linear_probe([[1.0], [2.0]], [[-1.0], [-2.0]])
>>> evaluate_probe(probe, [[0.5]], [[-0.5]]).accuracy
1.0
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dpo_jax.ops import masked_mean, require_between, require_positive
from dpo_jax.statistics import logistic_regression
from dpo_jax.types import Array

MIN_CHARS = 5


class BestWorst(NamedTuple):
    """Places of the most and the least rewarded of several answers."""

    best: int
    worst: int


class SourcedPair(NamedTuple):
    """Two answers to a prompt in order of preference, and where each is from."""

    chosen: str
    rejected: str
    chosen_source: str
    rejected_source: str


class LinearProbe(NamedTuple):
    """A linear classifier of answers: sigma(weight [D] . feature + bias) is the chance of `chosen`."""

    weight: np.ndarray
    bias: float


class Separability(NamedTuple):
    """How well a probe tells chosen from rejected answers.

    Attributes:
      accuracy: over both kinds of answers, a logit of exactly 0 counts one half.
      pair_accuracy: share of pairs whose chosen answer has the strictly larger logit.
      nll: mean log loss, nats.
    """

    accuracy: float
    pair_accuracy: float
    nll: float


# Pairs


def best_worst(candidates: Sequence[str], rewards: Sequence[float], *, min_chars: int = MIN_CHARS) -> BestWorst | None:
    """The most and the least rewarded answers to one prompt, the first of equals; None if they do not differ.

    Args:
      candidates: answers; those of fewer than `min_chars` characters, stripped, are left out.
      rewards: one per answer, finite.
      min_chars: shortest answer that counts.

    Raises:
      ValueError: another number of rewards than answers, or one that is not finite.
    """
    if len(candidates) != len(rewards) or not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"{len(candidates)} answers with rewards {list(rewards)}; give one finite reward per answer")
    valid = [i for i, text in enumerate(candidates) if len(text.strip()) >= min_chars]
    if len(valid) < 2:
        return None
    best = max(valid, key=lambda i: rewards[i])  # the first of equals, as min below
    worst = min(valid, key=lambda i: rewards[i])
    return None if candidates[best] == candidates[worst] else BestWorst(best, worst)


def self_ranked_pairs(
    prompts: Sequence[str],
    samples: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float]],
    *,
    min_chars: int = MIN_CHARS,
) -> list[dict[str, str]]:
    """Self+RM: best against worst of a model's own samples; prompts without two that differ are left out.

    Args:
      prompts: N texts.
      samples: N lists of the prompt's own samples, so that none can slip to another prompt.
      rewards: N lists, one reward per sample.
      min_chars: shortest sample that counts.

    Returns:
      rows of `prompt`, `chosen`, `rejected`, `chosen_source`, `rejected_source`.

    Raises:
      ValueError: numbers that differ.
    """
    _require_as_many(prompts, samples=samples, rewards=rewards)
    rows = []
    for prompt, texts, values in zip(prompts, samples, rewards):
        ends = best_worst(texts, values, min_chars=min_chars)
        if ends is not None:
            rows.append(_row(prompt, SourcedPair(texts[ends.best], texts[ends.worst], "self", "self")))
    return rows


def combine_sources(self_answer: str, strong_answer: str, *, self_reward: float, strong_reward: float) -> SourcedPair:
    """The pair of a model's own answer and a stronger model's: the own one is chosen only if rewarded strictly more."""
    if self_reward > strong_reward:
        return SourcedPair(self_answer, strong_answer, "self", "strong")
    return SourcedPair(strong_answer, self_answer, "strong", "self")


def pool_ranked_pairs(
    prompts: Sequence[str],
    *,
    self_answers: Sequence[str],
    strong_answers: Sequence[str],
    self_rewards: Sequence[float],
    strong_rewards: Sequence[float],
) -> list[dict[str, str]]:
    """`combine_sources` for every prompt; equal or blank answers are left out.

    Returns:
      rows as of `self_ranked_pairs`, sources "self" and "strong".

    Raises:
      ValueError: numbers that differ.
    """
    columns = dict(
        self_answers=self_answers,
        strong_answers=strong_answers,
        self_rewards=self_rewards,
        strong_rewards=strong_rewards,
    )
    _require_as_many(prompts, **columns)
    pairs = [
        combine_sources(own, strong, self_reward=own_reward, strong_reward=strong_reward)
        for own, strong, own_reward, strong_reward in zip(*columns.values())
    ]
    return [_row(prompt, pair) for prompt, pair in zip(prompts, pairs) if _usable(pair)]


def make_preference_pairs(
    prompts: Sequence[str],
    *,
    chosen: Sequence[str],
    rejected: Sequence[str],
    chosen_source: str,
    rejected_source: str,
) -> list[dict[str, str]]:
    """Pairs whose order the sources decide (HC+Self, GPT4o+Self, Stronger+Self); equal or blank answers are left out.

    Args:
      prompts, chosen, rejected: N texts each.
      chosen_source, rejected_source: such as "human", "gpt-4o", "strong", "self"; kept in the rows.

    Raises:
      ValueError: numbers that differ.
    """
    _require_as_many(prompts, chosen=chosen, rejected=rejected)
    pairs = [SourcedPair(better, worse, chosen_source, rejected_source) for better, worse in zip(chosen, rejected)]
    return [_row(prompt, pair) for prompt, pair in zip(prompts, pairs) if _usable(pair)]


def _usable(pair: SourcedPair) -> bool:
    return bool(pair.chosen.strip()) and bool(pair.rejected.strip()) and pair.chosen != pair.rejected


def _row(prompt: str, pair: SourcedPair) -> dict[str, str]:
    return {"prompt": prompt, **pair._asdict()}


def _require_as_many(prompts: Sequence[str], **columns: Sequence) -> None:
    for name, values in columns.items():
        if len(values) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(values)} {name}; give one per prompt")


# The probe


def pool_hidden(hidden: Array, mask: Array) -> Array:
    """Mean hidden state over an answer's tokens, float32 [B, D]; zero for an empty answer.

    Args:
      hidden: [B, T, D] of the last layer; what stands behind the mask is not read.
      mask: [B, T], one at completion tokens.
    """
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    return masked_mean(hidden, mask[..., None], axis=-2)


def last_hidden(hidden: Array, mask: Array) -> Array:
    """Hidden state of an answer's last token, float32 [B, D]; arguments as of `pool_hidden`."""
    chex.assert_equal_shape_prefix([hidden, mask], 2)
    there = mask != 0
    places = jnp.arange(mask.shape[-1])
    last = there & (places == jnp.max(jnp.where(there, places, -1), axis=-1, keepdims=True))
    return pool_hidden(hidden, last)


def linear_probe(chosen: ArrayLike, rejected: ArrayLike, *, l2: float = 0.01) -> LinearProbe:
    """Logistic regression of chosen (1) against rejected (0) answers; the bias has no penalty.

    Args:
      chosen, rejected: [N, D] and [M, D] features, one row per answer.
      l2: penalty (l2/2) |weight|^2 next to the mean log loss, above 0: separable data need it.

    Raises:
      ValueError: no answers, dimensions that differ, l2 not above 0.
    """
    require_positive(l2=l2)
    a, b = _features(chosen, rejected)
    features, labels = np.concatenate([a, b]), np.r_[np.ones(len(a)), np.zeros(len(b))]
    centre = features.mean(0)  # a shift of all features only moves the bias
    x = np.concatenate([features - centre, np.ones((len(features), 1))], axis=1)
    penalty = np.r_[np.full(a.shape[1], l2), 0.0]
    w = logistic_regression(x, labels, weights=np.full(len(x), 1 / len(x)), penalty=penalty)
    return LinearProbe(w[:-1], float(w[-1] - w[:-1] @ centre))


def evaluate_probe(probe: LinearProbe, chosen: ArrayLike, rejected: ArrayLike) -> Separability:
    """Accuracy and log loss of a probe on pairs, better ones that it was not fitted to.

    Args:
      probe: of `linear_probe`.
      chosen, rejected: [N, D], row i of both under one prompt.

    Raises:
      ValueError: no pairs, or shapes that differ.
    """
    a, b = _features(chosen, rejected)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} chosen and {len(b)} rejected answers; give pairs")
    right = np.concatenate([a @ probe.weight + probe.bias, -(b @ probe.weight + probe.bias)])
    return Separability(
        accuracy=float(np.mean((right > 0) + 0.5 * (right == 0))),
        pair_accuracy=float(np.mean((a - b) @ probe.weight > 0)),
        nll=float(np.mean(np.logaddexp(0.0, -right))),
    )


def mahalanobis_gap(chosen: ArrayLike, rejected: ArrayLike, *, eps: float = 1e-6) -> float:
    """Distance of the two class means in standard deviations, sqrt(d' S^-1 d), S with n - 1 degrees of freedom.

    Args:
      chosen, rejected: [N, D] and [M, D], at least two rows each.
      eps: added to the diagonal of S, at least 0; 0 makes the gap invariant to invertible linear maps of the features.

    Raises:
      ValueError: fewer than two rows, dimensions that differ, eps out of range.
    """
    require_between(0.0, float("inf"), eps=eps)
    a, b = _features(chosen, rejected)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} chosen and {len(b)} rejected answers; a covariance needs at least two of both")
    gap = a.mean(0) - b.mean(0)
    covariance = 0.5 * sum(np.atleast_2d(np.cov(v, rowvar=False)) for v in (a, b)) + eps * np.eye(len(gap))
    return float(np.sqrt(gap @ np.linalg.solve(covariance, gap)))


def _features(chosen: ArrayLike, rejected: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    if a.ndim != 2 or b.ndim != 2 or not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {a.shape} and {b.shape}; give [N, D] and [M, D] with at least one row each")
    return a, b
