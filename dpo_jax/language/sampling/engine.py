"""Completions of any number of prompts: compiled chunks of decode steps, and a host loop that refills finished rows.

A batch has a fixed number of rows. After each chunk the rows whose completions have ended take the next prompts: these
are prefilled, several at once, and put into the batch's cache. Prompts are sorted into buckets by length, each with a
cache of its own width and one compilation. Parameters are arguments of the compiled functions and never copied.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax.language.sampling.draw import Drawn, Rows, draw_steps, start_rows
from dpo_jax.language.sampling.filters import UNFILTERED, Sampling
from dpo_jax.language.sampling.steps import (
    CachedModel,
    CacheState,
    Combine,
    prefill,
    spread_cache,
    step_function,
    widen,
)
from dpo_jax.sharding import constrain, data_shards
from dpo_jax.types import Array, PyTree

SMALLEST_BUCKET = 16

# Tokens of a completion so far -> how many of them to keep if it ends here, or None if it goes on.
EndTest = Callable[[np.ndarray], int | None]
# (prompt, sample, tokens so far, whether it has ended), after every chunk.
Listener = Callable[[int, int, np.ndarray, bool], None]


class Completion(NamedTuple):
    """One answer to a prompt.

    Attributes:
      tokens: int32 [C], the stop token included where one came.
      logps: float32 [M, C] under each model itself, without filters at temperature 1; of guided models, under their
        combination.
      drawn_logps: float32 [C] under what was drawn from, after all filters.
      ended: by a stop token or an end test, not by the limit.
    """

    tokens: np.ndarray
    logps: np.ndarray
    drawn_logps: np.ndarray
    ended: bool


@dataclass(frozen=True)
class Engine:
    """Compiled functions and their static sizes; made by `make_engine`, used by `generate`.

    Attributes:
      start: (width) -> rows that are all done, with room for prompts of this width.
      admit: (variables, rows, prompts, lengths, source, samples, key data) -> rows, some of them begun anew.
      advance: (variables, rows) -> (rows, Drawn) after a chunk of steps.
      rows: N, completions at a time.
      prefill_rows: prompts that are prefilled at once.
      stop_tokens: ids that end a completion.
      mesh: that rows and heads are spread over, or None.
    """

    start: Callable[[int], Rows]
    admit: Callable[..., Rows]
    advance: Callable[[Sequence[PyTree], Rows], tuple[Rows, Drawn]]
    rows: int
    prefill_rows: int
    stop_tokens: tuple[int, ...]
    mesh: Mesh | None


def make_engine(
    models: Sequence[CachedModel],
    *,
    new_tokens: int,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling = UNFILTERED,
    combine: Combine | None = None,
    rows: int = 32,
    prefill_rows: int | None = None,
    chunk: int = 16,
    vocabulary_size: int | None = None,
    mesh: Mesh | None = None,
) -> Engine:
    """An engine; nothing is compiled before it is used, and once per bucket of prompt lengths.

    Args:
      models: one, or several of one vocabulary in lock-step; the first is drawn from.
      new_tokens: most tokens of a completion.
      stop_tokens: ids that end a completion, and belong to it.
      sampling: filters and temperature.
      combine: makes what is drawn from of all models' logits (`steps.guided`).
      rows: completions at a time.
      prefill_rows: prompts prefilled at once when rows are refilled; a quarter of the rows by default.
      chunk: decode steps between two looks at which rows are done; 1 streams token by token.
      vocabulary_size: V, needed by a repetition penalty.
      mesh: rows over its batch axes, heads over its model axis.

    Raises:
      ValueError: sizes below 1, a repetition penalty without vocabulary_size, rows that the mesh does not divide.
    """
    shards = 1 if mesh is None else data_shards(mesh)
    prefill_rows = max(1, rows // 4 // shards) * shards if prefill_rows is None else prefill_rows
    sizes = {"new_tokens": new_tokens, "rows": rows, "prefill_rows": prefill_rows, "chunk": chunk}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; give 1 or more")
    if rows % shards or prefill_rows % shards:
        raise ValueError(f"rows {rows} and prefill_rows {prefill_rows} must be multiples of the mesh's {shards} parts")
    remembers = sampling.repetition_penalty != 1
    if remembers and vocabulary_size is None:
        raise ValueError("a repetition penalty needs vocabulary_size; give the number of words")
    models = tuple(models)

    def start(width: int) -> Rows:
        nothing = jnp.zeros(rows, jnp.int32)
        caches = tuple(spread_cache(model.empty_cache(rows, width + new_tokens)) for model in models)
        seen = jnp.zeros((rows, vocabulary_size), bool) if remembers else None
        begun = start_rows(CacheState(caches, nothing), nothing, jax.random.split(jax.random.key(0), rows), seen)
        return begun._replace(done=jnp.ones(rows, bool))

    def admit(
        variables: Sequence[PyTree],
        old: Rows,
        prompts: Array,
        lengths: Array,
        source: Array,
        samples: Array,
        keys: Array,
    ) -> Rows:
        """Prompts [R, P], lengths [R], keys' data [R, ...] -> rows; source [N] is the prompt of each row, or -1."""
        columns = prompts.shape[1] + new_tokens
        last, state = prefill(models, variables, prompts, lengths)
        there = jnp.arange(prompts.shape[1]) < lengths[:, None]
        seen = _words(prompts, there, vocabulary_size) if vocabulary_size is not None and remembers else None
        pick = jnp.maximum(source, 0)
        folded = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys)[pick], samples)
        caches = jax.tree.map(lambda leaf: leaf[:, pick], state.caches)
        fresh = widen(CacheState(caches, state.positions[pick]), columns)
        new = start_rows(fresh, last[pick], folded, None if seen is None else seen[pick])
        taken = source >= 0

        def choose(new: Array, old: Array, axis: int = 0) -> Array:
            return jnp.where(taken.reshape([-1 if i == axis else 1 for i in range(new.ndim)]), new, old)

        caches = jax.tree.map(partial(choose, axis=1), new.state.caches, old.state.caches)
        chosen = jax.tree.map(choose, new._replace(state=new.state.positions), old._replace(state=old.state.positions))
        return chosen._replace(state=CacheState(spread_cache(caches), chosen.state))

    def advance(variables: Sequence[PyTree], begun: Rows) -> tuple[Rows, Drawn]:
        step_fn = step_function(models, variables, combine)
        options: dict[str, Any] = {"limit": new_tokens, "stop_tokens": stop_tokens, "sampling": sampling}
        begun, drawn = draw_steps(step_fn, begun, steps=chunk, **options)
        begun = begun._replace(state=begun.state._replace(caches=spread_cache(begun.state.caches)))
        # Replicated: every process reads all of it.
        return begun._replace(done=constrain(begun.done)), jax.tree.map(constrain, drawn)

    return Engine(
        jax.jit(start, static_argnums=0),
        jax.jit(admit, donate_argnums=1),
        jax.jit(advance, donate_argnums=1),
        rows,
        prefill_rows,
        tuple(stop_tokens),
        mesh,
    )


def _words(tokens: Array, there: Array, vocabulary_size: int) -> Array:
    """Bool [R, V]: which words each row of tokens [R, P] holds where `there` is true."""
    rows = jnp.arange(len(tokens))[:, None]
    return jnp.zeros((len(tokens), vocabulary_size), bool).at[rows, tokens].max(there)


def prompt_keys(key: Array, count: int) -> Array:
    """Typed keys [count], one for each prompt of a call."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))


def bucket_width(length: int) -> int:
    """Compiled prompt width of a prompt's length: the next power of two, from 16 on."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def generate(
    engine: Engine,
    variables: Sequence[PyTree],
    prompts: Sequence[np.ndarray],
    keys: Array,
    *,
    samples: int = 1,
    end_test: EndTest | None = None,
    listener: Listener | None = None,
) -> list[list[Completion]]:
    """Completions of all prompts; what a prompt gets depends on its key and its tokens alone.

    Args:
      engine: of `make_engine`.
      variables: of each model, in the order of the engine's models; used in place.
      prompts: int32 arrays, each of at least one token.
      keys: typed PRNG keys, one for each prompt (`prompt_keys`).
      samples: completions of each prompt.
      end_test: looks after every chunk whether a completion has ended before its last token, such as at a stop string.
      listener: is told after every chunk.

    Returns:
      For each prompt its completions.

    Raises:
      ValueError: an empty prompt, a number of keys that is not that of the prompts, samples below 1.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; give 1 or more")
    if len(keys) != len(prompts):
        raise ValueError(f"there are {len(keys)} keys for {len(prompts)} prompts; give one for each")
    if empty := [place for place, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompts {empty} are empty; a prompt needs at least one token")
    key_data = np.asarray(jax.random.key_data(keys))
    buckets: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        buckets.setdefault(bucket_width(len(prompt)), []).append(place)
    results: dict[tuple[int, int], Completion] = {}
    with nullcontext() if engine.mesh is None else jax.set_mesh(engine.mesh):
        for width, places in sorted(buckets.items()):
            jobs = deque((place, sample) for place in places for sample in range(samples))
            results |= _run_bucket(engine, variables, prompts, key_data, width, jobs, end_test, listener)
    return [[results[place, sample] for sample in range(samples)] for place in range(len(prompts))]


def _run_bucket(
    engine: Engine,
    variables: Sequence[PyTree],
    prompts: Sequence[np.ndarray],
    key_data: np.ndarray,
    width: int,
    waiting: deque[tuple[int, int]],
    end_test: EndTest | None,
    listener: Listener | None,
) -> dict[tuple[int, int], Completion]:
    """All (prompt, sample) jobs of one width."""
    rows = engine.start(width)
    busy: dict[int, tuple[int, int]] = {}  # row -> job
    begun_at: dict[int, int] = {}  # row -> number of its first chunk
    chunks: dict[int, Drawn] = {}
    results: dict[tuple[int, int], Completion] = {}
    number = 0
    while waiting or busy:
        while waiting and len(busy) < engine.rows:
            free = (row for row in range(engine.rows) if row not in busy)
            begun = _next_jobs(waiting, free, engine.prefill_rows)
            rows = engine.admit(variables, rows, *_admission(engine, prompts, key_data, width, begun))
            busy |= begun
            begun_at |= dict.fromkeys(begun, number)
        rows, drawn = engine.advance(variables, rows)
        chunks[number], done = jax.device_get((drawn, rows.done))
        number += 1
        for row, job in list(busy.items()):
            if not done[row] and end_test is None and listener is None:
                continue
            since = [chunks[i] for i in range(begun_at[row], number)]
            completion, over = _completion(since, row, engine.stop_tokens, end_test)
            over = over or bool(done[row])
            if listener is not None:
                listener(*job, completion.tokens, over)
            if over:
                results[job] = completion
                del busy[row], begun_at[row]
        for old in range(min(chunks), min(begun_at.values(), default=number)):
            del chunks[old]
    return results


def _next_jobs(waiting: deque[tuple[int, int]], free: Iterator[int], most: int) -> dict[int, tuple[int, int]]:
    """Jobs for free rows, taken off the queue: no more than these rows, and no more different prompts than `most`."""
    jobs: dict[int, tuple[int, int]] = {}
    while waiting and len({place for place, _ in [*jobs.values(), waiting[0]]}) <= most:
        row = next(free, None)
        if row is None:
            break
        jobs[row] = waiting.popleft()
    return jobs


def _admission(
    engine: Engine, prompts: Sequence[np.ndarray], key_data: np.ndarray, width: int, jobs: dict[int, tuple[int, int]]
) -> tuple[np.ndarray, ...]:
    """What `admit` is told of jobs, in static shapes: every prompt once, the rows that take it, keys, samples."""
    places = list(dict.fromkeys(place for place, _ in jobs.values()))
    tokens = np.zeros((engine.prefill_rows, width), np.int32)
    lengths = np.ones(engine.prefill_rows, np.int32)
    keys = np.zeros((engine.prefill_rows, *key_data.shape[1:]), key_data.dtype)
    for line, place in enumerate(places):
        lengths[line] = len(prompts[place])
        tokens[line, : lengths[line]] = prompts[place]
        keys[line] = key_data[place]
    source, samples = np.full(engine.rows, -1, np.int32), np.zeros(engine.rows, np.int32)
    for row, (place, sample) in jobs.items():
        source[row], samples[row] = places.index(place), sample
    return tokens, lengths, source, samples, keys


def _completion(
    chunks: Sequence[Drawn], row: int, stop_tokens: Sequence[int], end_test: EndTest | None
) -> tuple[Completion, bool]:
    """What a row has drawn in these chunks, and whether the end test ends it."""
    mask = np.concatenate([chunk.mask[row] for chunk in chunks]) > 0
    tokens = np.concatenate([chunk.tokens[row] for chunk in chunks])[mask]
    logps = np.concatenate([chunk.logps[row] for chunk in chunks], axis=1)[:, mask]
    drawn_logps = np.concatenate([chunk.drawn_logps[row] for chunk in chunks])[mask]
    kept = None if end_test is None else end_test(tokens)
    if kept is not None:
        return Completion(tokens[:kept], logps[:, :kept], drawn_logps[:kept], True), True
    return Completion(tokens, logps, drawn_logps, bool(tokens[-1] in stop_tokens)), False
