"""Beam search, free of models: by likelihood, or by the implicit value of a policy and its reference in lock-step.

Likelihood search over a preference-trained policy is search on reward plus value (Rafailov et al. 2024, arXiv
2404.12358; see `methods.r_to_q`). The rule, for K beams per group:

- each step ranks all continuations of the live beams; the best K of them that end (in a stop token) are finished
  hypotheses, the best K that do not end live on. A hypothesis that ends is admitted only if it is among the best K
  continuations of its step, endings or not: so one beam is greedy decoding;
- finished hypotheses are compared by score / normaliser(tokens), the stop token included; the best K are kept, older
  ones first among equals;
- the search is over when K are finished and no live beam can overtake the worst of them. That is known only of
  likelihoods, which never rise; other scores search to the limit;
- a group without a finished hypothesis returns its live beams.

Dead beams stand at -inf and never come back. Ties go to the earlier beam, then to the lower word.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.language.sampling.steps import StepFunction, take_rows
from dpo_jax.ops import require_between, require_positive
from dpo_jax.types import Array, PyTree

TokenScores = Callable[[Array], Array]  # log-probs of all models [N, M, V] -> what a token adds to the score [N, V]
Normaliser = Callable[[Array], Array]  # int32 number of tokens -> what scores are divided by


class Beams(NamedTuple):
    """The K best sequences of each group, best first.

    Attributes:
      tokens: int32 [B, K, T], `pad` after the end.
      lengths: int32 [B, K], stop token included; 0 where there is no such sequence.
      scores: float32 [B, K], divided by the normaliser; -inf where there is no such sequence.
      logps: float32 [B, K, M], sum of the sequence's log-probabilities under each model.
      finished: bool [B, K], whether the sequence has ended in a stop token.
    """

    tokens: Array
    lengths: Array
    scores: Array
    logps: Array
    finished: Array


def implicit_value(beta: float) -> TokenScores:
    """Scores of two models, policy and reference: the policy's token reward beta (log pi - log pi_ref).

    Raises:
      ValueError: beta is not above 0.
    """
    require_positive(beta=beta)

    def scores(logps: Array) -> Array:
        policy, reference = logps[:, 0], logps[:, 1]
        # Where the policy never goes the value is -inf, whatever the reference thinks.
        return jnp.where(jnp.isneginf(policy), -jnp.inf, beta * (policy - reference))

    return scores


def length_power(alpha: float) -> Normaliser:
    """The number of tokens to the power alpha; 0 compares the scores as they are."""
    require_between(0.0, float("inf"), alpha=alpha)
    return lambda count: count.astype(jnp.float32) ** alpha


def gnmt_penalty(alpha: float) -> Normaliser:
    """((5 + tokens) / 6)^alpha, the length penalty of Wu et al. 2016, arXiv 1609.08144."""
    require_between(0.0, float("inf"), alpha=alpha)
    return lambda count: ((5 + count.astype(jnp.float32)) / 6) ** alpha


class _Search(NamedTuple):
    """Live beams (scores unnormalised) and finished ones, with the state and last tokens of the B * K live rows."""

    step: Array
    state: PyTree
    last: Array
    live: Beams
    finished: Beams


def beam_search(
    step_fn: StepFunction,
    state: PyTree,
    tokens: Array,
    *,
    width: int,
    limit: int,
    stop_tokens: Sequence[int],
    token_scores: TokenScores | None = None,
    normaliser: Normaliser | None = None,
    reorder: Callable[[PyTree, Array], PyTree] = take_rows,
    pad: int = 0,
) -> Beams:
    """The best sequences that go on from some tokens; pure, to be jitted by the caller.

    Args:
      step_fn: `(tokens [B * K], state) -> (logits [B * K, V] or [B * K, M, V], state)`.
      state: of B rows.
      tokens: int32 [B], what the step function is given first.
      width: K, beams of each group.
      limit: T, most tokens of a sequence.
      stop_tokens: ids that end a sequence.
      token_scores: what a token adds to a score; by default its log-probability under the first model.
      normaliser: non-decreasing in the number of tokens; by default scores are compared as they are.
      reorder: `(state of B * K rows, rows [B, K']) -> state of B * K' rows`.
      pad: id that stands after the end.

    Raises:
      ValueError: a width or limit below 1.
    """
    for name, size in (("width", width), ("limit", limit)):
        if size < 1:
            raise ValueError(f"{name} is {size}; give 1 or more")
    groups, falls = tokens.shape[0], token_scores is None
    stops = jnp.array(stop_tokens, jnp.int32)

    def divided(scores: Array, count: Array) -> Array:
        if normaliser is None:
            return scores
        return jnp.where(jnp.isneginf(scores), scores, scores / normaliser(jnp.maximum(count, 1)))

    def proceed(search: _Search) -> _Search:
        logits, state = step_fn(search.last.reshape(-1), search.state)
        logits = logits.astype(jnp.float32)
        logps = jax.nn.log_softmax(logits if logits.ndim == 3 else logits[:, None], axis=-1)  # [B * K, M, V]
        added = (logps[:, 0] if token_scores is None else token_scores(logps)).reshape(groups, width, -1)
        live, count = search.live, search.step + 1
        # -inf + inf must not revive a dead beam.
        dead = jnp.isneginf(live.scores)[..., None] | jnp.isneginf(added)
        scores, beam, word = _best_continuations(
            jnp.where(dead, -jnp.inf, live.scores[..., None] + added), (len(stop_tokens) + 1) * width
        )
        places = logps.reshape(groups, width, *logps.shape[1:])
        sums = jax.vmap(lambda sums, logps, b, w: sums[b] + logps[b, :, w])(live.logps, places, beam, word)
        written = jax.vmap(lambda rows, b: rows[b])(live.tokens, beam).at[:, :, search.step].set(word)
        ends = jnp.any(word[..., None] == stops, axis=-1)
        ended = ends & (jnp.arange(word.shape[1]) < width) & ~jnp.isneginf(scores)
        lengths = jnp.full_like(word, count)
        candidates = Beams(written, lengths, jnp.where(ended, divided(scores, count), -jnp.inf), sums, ended)
        both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), search.finished, candidates)
        finished = _take(both, _order(both.scores, width))
        # Those that have ended go behind all others, in their order.
        onward = _order(jnp.where(ends, -jnp.inf, scores), width)
        goes_on = candidates._replace(scores=jnp.where(ends, -jnp.inf, scores), finished=jnp.zeros_like(ended))
        live = _take(goes_on, onward)
        parents = jnp.take_along_axis(beam, onward, axis=1)
        return _Search(count, reorder(state, parents), live.tokens[:, :, count - 1], live, finished)

    def goes_on(search: _Search) -> Array:
        best = jnp.max(search.live.scores, axis=1)
        # A likelihood only falls, and the normaliser is largest at the limit.
        bound = divided(best, jnp.int32(limit)) if falls else jnp.inf
        open_groups = (best > -jnp.inf) & (jnp.min(search.finished.scores, axis=1) < bound)
        return (search.step < limit) & jnp.any(open_groups)

    state = reorder(state, jnp.zeros((groups, width), jnp.int32))
    nothing = _no_beams(step_fn, state, tokens, width, limit, pad)
    live = nothing._replace(scores=nothing.scores.at[:, 0].set(0.0))
    last = jnp.broadcast_to(tokens[:, None], (groups, width)).astype(jnp.int32)
    search = jax.lax.while_loop(goes_on, proceed, _Search(jnp.int32(0), state, last, live, nothing))
    left = search.live._replace(scores=divided(search.live.scores, search.step))
    any_finished = jnp.any(search.finished.finished, axis=1)

    def choose(finished: Array, live: Array) -> Array:
        return jnp.where(any_finished.reshape(-1, *[1] * (live.ndim - 1)), finished, live)

    best = jax.tree.map(choose, search.finished, left)
    there = ~jnp.isneginf(best.scores)
    lengths = jnp.where(there, best.lengths, 0)
    kept = jnp.arange(limit) < lengths[..., None]
    return Beams(jnp.where(kept, best.tokens, pad), lengths, best.scores, best.logps, best.finished)


def _no_beams(step_fn: StepFunction, state: PyTree, tokens: Array, width: int, limit: int, pad: int) -> Beams:
    """K beams of each group that are dead; the number of models is what the step function answers."""
    groups = tokens.shape[0]
    logits = jax.eval_shape(step_fn, jnp.repeat(tokens, width), state)[0]
    models = logits.shape[1] if len(logits.shape) == 3 else 1
    return Beams(
        jnp.full((groups, width, limit), pad, jnp.int32),
        jnp.zeros((groups, width), jnp.int32),
        jnp.full((groups, width), -jnp.inf),
        jnp.zeros((groups, width, models)),
        jnp.zeros((groups, width), bool),
    )


def _best_continuations(scores: Array, count: int) -> tuple[Array, Array, Array]:
    """The best of [B, K, V]: scores, beams and words [B, C], best first; first within each beam, then among beams."""
    groups, width, words = scores.shape
    values, picked = jax.lax.top_k(scores, min(count, words))  # [B, K, C']
    best, place = jax.lax.top_k(values.reshape(groups, -1), min(count, width * values.shape[-1]))
    word = jnp.take_along_axis(picked.reshape(groups, -1), place, axis=1)
    return best, place // values.shape[-1], word.astype(jnp.int32)


def _order(scores: Array, width: int) -> Array:
    """Places [B, K] of the largest scores [B, C], best first, the earlier of equals; C may be below K."""
    places = jax.lax.top_k(scores, min(width, scores.shape[1]))[1]
    # Fewer continuations than beams (few words): what is left over must be dead, and is, by `_take`.
    return jnp.pad(places, ((0, 0), (0, width - places.shape[1])), constant_values=scores.shape[1])


def _take(beams: Beams, places: Array) -> Beams:
    """Beams at some places of each group; dead ones at places behind the last."""
    outside = places >= beams.scores.shape[1]
    inside = jnp.where(outside, 0, places)
    taken: Beams = jax.tree.map(lambda leaf: jax.vmap(lambda group, index: group[index])(leaf, inside), beams)
    return taken._replace(
        scores=jnp.where(outside, -jnp.inf, taken.scores), finished=jnp.where(outside, False, taken.finished)
    )
