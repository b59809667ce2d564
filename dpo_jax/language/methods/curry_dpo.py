"""Curry-DPO: several pairs from each rated list, trained from easy to hard, each stage against the last one's model.

Pattnaik et al. 2024, arXiv 2403.07230. Evidence: the paper's text (pairs, easy-to-hard order, iterated reference); the
rules for ties and for pooled stages are ours. With responses rated R_1 > R_2 > ... > R_K of one prompt,

    pairs    (R_1, R_j), easy if the gap of the ratings is large: (R_1, R_K) first, (R_1, R_2) last
    stage i  train pi from pi_{i-1} with dpo_loss on the i-th easiest pairs, reference pi_{i-1} frozen; pi_0 is the SFT
             model

Adds no loss: `dpo_loss` trains each stage. Between stages reference log-probabilities have to be computed anew.
Another measure of easiness, such as the margin of a reward model, takes the gap's place: `pair._replace(gap=...)`.
Reduces to: DPO for one stage of one pair per prompt. With an iterated reference the loss of a stage begins at log 2,
and the log ratios of the stages add up to that of the last model to the first.
All functions run on the host.

>>> pairs = preference_pairs([3.0, 5.0, 1.0, 4.0])
>>> [(pair.chosen, pair.rejected, pair.gap) for pair in pairs]
[(1, 2, 4.0), (1, 0, 2.0), (1, 3, 1.0)]
>>> curriculum_stages([pairs, preference_pairs([2.0, 1.0])], num_stages=2)[0]
[StagePair(prompt=0, chosen=1, rejected=2), StagePair(prompt=1, chosen=0, rejected=1)]
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from dpo_jax.types import PyTree

Stage = TypeVar("Stage")
Record = TypeVar("Record")


class RatedPair(NamedTuple):
    """Two responses of one prompt.

    Attributes:
      chosen, rejected: indices into the prompt's responses.
      gap: how easy the pair is; by default the difference of the ratings, above 0.
    """

    chosen: int
    rejected: int
    gap: float


class StagePair(NamedTuple):
    """One pair of a stage: index of its prompt, and of two of that prompt's responses."""

    prompt: int
    chosen: int
    rejected: int


def preference_pairs(scores: Sequence[float]) -> list[RatedPair]:
    """The best response against each other one of a prompt, easy to hard; host.

    Of equal ratings the lower index comes first: as the best, and among equal gaps. A response rated like the best
    gives no pair.

    Args:
      scores: rating of each response, finite.

    Raises:
      ValueError: a rating that is not finite.
    """
    _require_finite(scores)
    best = max(range(len(scores)), key=lambda i: scores[i], default=0)
    pairs = [RatedPair(best, j, float(scores[best] - scores[j])) for j in range(len(scores))]
    return _easy_first(pairs)


def all_preference_pairs(scores: Sequence[float]) -> list[RatedPair]:
    """Every pair of differently rated responses of a prompt, easy to hard; host.

    Args:
      scores: rating of each response, finite.

    Raises:
      ValueError: a rating that is not finite.
    """
    _require_finite(scores)
    count = range(len(scores))
    return _easy_first([RatedPair(i, j, float(scores[i] - scores[j])) for i in count for j in count])


def curriculum_stages(pairs: Sequence[Sequence[RatedPair]], *, num_stages: int) -> list[list[StagePair]]:
    """Stage i takes the i-th easiest pair of each prompt; host.

    Prompts with fewer pairs are missing from late stages, pairs beyond the last stage are left out.

    Args:
      pairs: of each prompt, in any order; equal gaps stay in their order.
      num_stages: number of stages, at least 1.

    Raises:
      ValueError: num_stages below 1.
    """
    _require_stages(num_stages)
    ranked = [sorted(of_prompt, key=lambda pair: -pair.gap) for of_prompt in pairs]
    return [
        [StagePair(n, own[stage].chosen, own[stage].rejected) for n, own in enumerate(ranked) if stage < len(own)]
        for stage in range(num_stages)
    ]


def pooled_stages(pairs: Sequence[Sequence[RatedPair]], *, num_stages: int) -> list[list[StagePair]]:
    """All pairs of all prompts, sorted from easy to hard and cut into stages whose sizes differ by at most one; host.

    Args:
      pairs: of each prompt; equal gaps stay in their order.
      num_stages: number of stages, at least 1; the first ones are the larger ones.

    Raises:
      ValueError: num_stages below 1.
    """
    _require_stages(num_stages)
    flat = [(pair.gap, StagePair(n, pair.chosen, pair.rejected)) for n, own in enumerate(pairs) for pair in own]
    ranked = [pair for _, pair in sorted(flat, key=lambda item: -item[0])]
    size, larger = divmod(len(ranked), num_stages)
    begin = [stage * size + min(stage, larger) for stage in range(num_stages + 1)]
    return [ranked[a:b] for a, b in pairwise(begin)]


def run_stages(
    train_stage: Callable[[PyTree, PyTree, Stage], tuple[PyTree, Record]],
    params: PyTree,
    stages: Sequence[Stage],
    *,
    reference: PyTree | None = None,
) -> tuple[PyTree, list[Record]]:
    """Train stage after stage, each against a frozen copy of the model that it starts from; host.

    Args:
      train_stage: (params, reference, stage) -> (params, record); it may donate the buffers of params. What an
        optimiser and a schedule remember is its own: begun anew in each call, as the library's default.
      params: the model to start from.
      stages: whatever train_stage takes, in order; one that is empty should be dropped before.
      reference: a fixed reference for all stages in place of the copies (the paper's non-iterated ablation).

    Returns:
      The last params, and the record of each stage.
    """
    history = []
    for stage in stages:
        frozen = jax.tree.map(jnp.copy, params) if reference is None else reference
        params, record = train_stage(params, frozen, stage)
        history.append(record)
    return params, history


def _easy_first(pairs: list[RatedPair]) -> list[RatedPair]:
    """Those of a positive gap, by descending gap; equal gaps stay in their order."""
    return sorted((pair for pair in pairs if pair.gap > 0), key=lambda pair: -pair.gap)


def _require_finite(scores: Sequence[float]) -> None:
    for number, score in enumerate(scores):
        if not math.isfinite(score):
            raise ValueError(f"the rating of response {number} is {score}; give a finite number")


def _require_stages(num_stages: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages is {num_stages}; give at least 1")
