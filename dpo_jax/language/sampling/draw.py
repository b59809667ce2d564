"""Sampling, free of models: a scan over steps in which every row draws its next token with a key of its own.

What a row draws depends on its key, its tokens and its own count of steps, never on its neighbours: rows may be at
different places of their completions, and any of them may be replaced between two scans.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.language.sampling.filters import UNFILTERED, Sampling, filtered_logps
from dpo_jax.language.sampling.steps import StepFunction
from dpo_jax.types import Array, PyTree


class Rows(NamedTuple):
    """Completions in the making.

    Attributes:
      state: of the step function.
      tokens: int32 [N], each row's last token, which the step function has not been given yet.
      keys: typed PRNG keys [N].
      drawn: int32 [N], tokens drawn so far.
      done: bool [N], whether the completion has ended.
      seen: bool [N, V], words of prompt and completion, or None without a repetition penalty.
    """

    state: PyTree
    tokens: Array
    keys: Array
    drawn: Array
    done: Array
    seen: Array | None = None


class Drawn(NamedTuple):
    """What some steps have drawn.

    Attributes:
      tokens: int32 [N, S], `pad` after the end.
      mask: float32 [N, S], one at drawn tokens, the stop token included.
      logps: float32 [N, M, S] under each model itself (no filter, temperature 1), zero after the end.
      drawn_logps: float32 [N, S] under what was drawn from, after all filters.
    """

    tokens: Array
    mask: Array
    logps: Array
    drawn_logps: Array


def start_rows(state: PyTree, tokens: Array, keys: Array, seen: Array | None = None) -> Rows:
    """Rows that have drawn nothing yet."""
    return Rows(state, tokens, keys, jnp.zeros_like(tokens), jnp.zeros(tokens.shape, bool), seen)


def draw_steps(
    step_fn: StepFunction,
    rows: Rows,
    *,
    steps: int,
    limit: int,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling = UNFILTERED,
    pad: int = 0,
) -> tuple[Rows, Drawn]:
    """Some steps of all rows; pure, to be jitted by the caller.

    Args:
      step_fn: `(tokens [N], state) -> (logits [N, V] or [N, M, V], state)`; the first of M models is drawn from.
      steps: S, steps to take.
      limit: most tokens of a completion.
      stop_tokens: ids that end a completion, and belong to it.
      sampling: filters and temperature.
      pad: id that stands after the end.
    """
    stops = jnp.array(stop_tokens, jnp.int32)

    def step(rows: Rows, _: None) -> tuple[Rows, Drawn]:
        logits, state = step_fn(rows.tokens, rows.state)
        logits = logits.astype(jnp.float32)
        logits = logits if logits.ndim == 3 else logits[:, None]  # [N, M, V]
        chances = filtered_logps(logits[:, 0], sampling, rows.seen)
        chosen = jnp.argmax(chances if sampling.temperature == 0 else chances + _noise(rows, chances), axis=-1)
        tokens = jnp.where(rows.done, pad, chosen).astype(jnp.int32)
        index = tokens[:, None]
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), index[..., None], axis=-1)[..., 0]  # [N, M]
        drawn_logps = jnp.take_along_axis(chances, index, axis=-1)[:, 0]
        out = Drawn(
            tokens,
            (~rows.done).astype(jnp.float32),
            jnp.where(rows.done[:, None], 0.0, logps),
            jnp.where(rows.done, 0.0, drawn_logps),
        )
        drawn = rows.drawn + ~rows.done
        done = rows.done | jnp.any(index == stops, axis=-1) | (drawn >= limit)
        seen = None if rows.seen is None else rows.seen | (index == jnp.arange(rows.seen.shape[-1]))
        return Rows(state, tokens, rows.keys, drawn, done, seen), out

    rows, drawn = jax.lax.scan(step, rows, length=steps)
    return rows, jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), drawn)


def _noise(rows: Rows, like: Array) -> Array:
    """Gumbel noise [N, V], a function of each row's key and count of steps alone."""

    def row(key: Array, number: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), like.shape[1:], jnp.float32)

    return jax.vmap(row)(rows.keys, rows.drawn)
