"""Beam search over decoders: prompts in buckets, one compiled search per bucket, models in lock-step."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.language.sampling.beam import Beams, Normaliser, TokenScores, beam_search
from dpo_jax.language.sampling.engine import bucket_width
from dpo_jax.language.sampling.steps import CachedModel, Combine, prefill, step_function, take_cache_rows, widen
from dpo_jax.sharding import constrain, data_shards
from dpo_jax.types import Array, PyTree


class Found(NamedTuple):
    """One sequence that a search has found.

    Attributes:
      tokens: int32 [C], the stop token included where it has ended.
      score: what it was ranked by.
      logps: float32 [M], its log-probability under each model; of guided models, under their combination.
      ended: by a stop token, not by the limit.
    """

    tokens: np.ndarray
    score: float
    logps: np.ndarray
    ended: bool


@dataclass(frozen=True)
class Searcher:
    """A compiled search and its static sizes; made by `make_searcher`, used by `search`.

    Attributes:
      run: (variables, prompts [G, P], lengths [G]) -> Beams.
      groups: G, prompts at a time.
      mesh: that groups and heads are spread over, or None.
    """

    run: Callable[[Sequence[PyTree], Array | np.ndarray, Array | np.ndarray], Beams]
    groups: int
    mesh: Mesh | None


def make_searcher(
    models: Sequence[CachedModel],
    *,
    width: int,
    new_tokens: int,
    stop_tokens: Sequence[int],
    token_scores: TokenScores | None = None,
    normaliser: Normaliser | None = None,
    combine: Combine | None = None,
    groups: int = 8,
    mesh: Mesh | None = None,
) -> Searcher:
    """A searcher; nothing is compiled before it is used, and once per bucket of prompt lengths.

    Args:
      models: one, or several of one vocabulary in lock-step.
      width: K, beams of each prompt.
      new_tokens: most tokens of a sequence.
      stop_tokens, token_scores, normaliser: as for `beam_search`.
      combine: makes the logits to search by of all models' (`steps.guided`).
      groups: prompts at a time.
      mesh: prompts over its batch axes, heads over its model axis.

    Raises:
      ValueError: groups that the mesh does not divide.
    """
    shards = 1 if mesh is None else data_shards(mesh)
    if groups < 1 or groups % shards:
        raise ValueError(f"groups is {groups}; give a multiple of {shards}, the parts of the mesh")
    models = tuple(models)

    @jax.jit
    def run(variables: Sequence[PyTree], prompts: Array, lengths: Array) -> Beams:
        last, state = prefill(models, variables, prompts, lengths)
        found = beam_search(
            step_function(models, variables, combine),
            widen(state, prompts.shape[1] + new_tokens),
            last,
            width=width,
            limit=new_tokens,
            stop_tokens=stop_tokens,
            token_scores=token_scores,
            normaliser=normaliser,
            reorder=take_cache_rows,
        )
        return jax.tree.map(constrain, found)  # replicated: every process reads all of it

    return Searcher(run, groups, mesh)


def search(searcher: Searcher, variables: Sequence[PyTree], prompts: Sequence[np.ndarray]) -> list[list[Found]]:
    """For each prompt the sequences that the search has found, best first; at most as many as beams.

    Args:
      searcher: of `make_searcher`.
      variables: of each model, in the order of the searcher's models; used in place.
      prompts: int32 arrays, each of at least one token.

    Raises:
      ValueError: an empty prompt.
    """
    if empty := [place for place, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts {empty} are empty; a prompt needs at least one token")
    results: dict[int, list[Found]] = {}
    order = sorted(range(len(prompts)), key=lambda place: bucket_width(len(prompts[place])))
    with nullcontext() if searcher.mesh is None else jax.set_mesh(searcher.mesh):
        while order:
            columns = bucket_width(len(prompts[order[0]]))
            places = [p for p in order[: searcher.groups] if bucket_width(len(prompts[p])) == columns]
            order = order[len(places) :]
            tokens, lengths = np.zeros((searcher.groups, columns), np.int32), np.ones(searcher.groups, np.int32)
            for row, place in enumerate(places):
                lengths[row] = len(prompts[place])
                tokens[row, : lengths[row]] = prompts[place]
            beams = jax.device_get(searcher.run(variables, tokens, lengths))
            results |= {place: _found(beams, row) for row, place in enumerate(places)}
    return [results[place] for place in range(len(prompts))]


def _found(beams: Beams, row: int) -> list[Found]:
    """The sequences of one group, without the places where there is none."""
    return [
        Found(tokens[:length], float(score), logps, bool(finished))
        for tokens, length, score, logps, finished in zip(*(leaf[row] for leaf in beams))
        if length
    ]
