"""Examples laid out as rows of prefix trees, or as plain padded rows: the one place where a batch's indices are made.

A packed row holds example after example, each as prompt, completion 0, completion 1, ... with positions that restart
after the prompt; a completion's own context, if it has one, stands before it. Prefix sharing for DPO is that of Wang &
Hegde 2024 (arXiv 2410.20305); here the last prompt token is not repeated: the first token of every completion is
predicted from the prompt's last hidden state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_jax.language.data.encode import is_per_token, outside
from dpo_jax.language.types import IGNORE, Batch, Example

_NARROW = {"float64": np.dtype(np.float32), "int64": np.dtype(np.int32)}  # what devices work with


@dataclass(frozen=True)
class Layout:
    """Static shapes of every batch of a run.

    Attributes:
      rows: R, rows of a batch.
      length: L, tokens of a row; for padded rows K segments of equal length.
      source_length: S, predicted tokens of a row.
      examples: E, examples of a row.
      completions: K, completions of an example.
      completion_length: T, tokens of a completion.
    """

    rows: int
    length: int
    source_length: int
    examples: int
    completions: int
    completion_length: int


class Lengths(NamedTuple):
    """Token counts of N examples.

    Attributes:
      prompt: int64 [N].
      completions: int64 [N, K], zero where a list has no further item.
      branches: int64 [N, K], completions with their contexts.
    """

    prompt: np.ndarray
    completions: np.ndarray
    branches: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Tokens that each example takes in a packed row, int64 [N]."""
        return self.prompt + self.branches.sum(1)


def example_lengths(examples: Sequence[Example]) -> Lengths:
    """Token counts of examples that all have K completions, some of them absent.

    Raises:
      ValueError: no examples, or a number of completions that varies.
    """
    if not examples:
        raise ValueError("there are no examples; expected at least one")
    counts = sorted({len(e.completions) for e in examples})
    if len(counts) > 1:
        raise ValueError(f"the examples have {counts} completions; a batch needs one number of them")
    prompt = np.array([len(e.prompt) for e in examples], np.int64)
    completions = np.array([[len(c) for c in e.completions] for e in examples], np.int64)
    return Lengths(prompt, completions, np.array([[len(b) for b in e.branches()] for e in examples], np.int64))


def pack_rows(assignment: Sequence[Sequence[Example]], layout: Layout, *, like: Example | None = None) -> Batch:
    """Rows that hold several examples, prompts once.

    Args:
      assignment: the examples of each row, at most R rows; rows that are not given stay empty.
      layout: the shapes.
      like: an example of the same data that tells the names, shapes and dtypes of the columns; by default the first of
        the assignment. Needed where a batch may be empty.

    Returns:
      Batch as NumPy arrays with split 1. Places without an example have weight 0; padding has subtree_end 0.

    Raises:
      ValueError: something does not fit the layout, or a column differs from that of `like`.
    """
    batch = _empty_batch(assignment, layout, like, split=1)
    for r, row in enumerate(assignment):
        offset, used = 0, 0
        for e, example in enumerate(row):
            prompt, end = len(example.prompt), offset + _total(example)
            predicted = sum(map(len, example.completions))
            _require_room("tokens", end, "length", layout.length)
            _require_room("completion tokens", used + predicted, "source_length", layout.source_length)
            _write(batch, r, offset, example.prompt, 0, end)
            start = offset + prompt
            for k, branch in enumerate(example.branches()):
                _write(batch, r, start, branch, prompt, start + len(branch))
                used = _predict(batch, (r, e, k), used, offset + prompt - 1, start, branch, example.completions[k])
                start += len(branch)
            offset = end
    return batch


def pad_rows(assignment: Sequence[Sequence[Example]], layout: Layout, *, like: Example | None = None) -> Batch:
    """One example per row, every completion in a segment of its own after its own copy of the prompt.

    The reference for `pack_rows`, and what a model without tree attention can run: within a segment the rule is plain
    causal attention. Arguments and errors as for `pack_rows`; split is K and L a multiple of K.
    """
    if layout.length % layout.completions:
        raise ValueError(f"length {layout.length} does not divide into {layout.completions} segments")
    segment = layout.length // layout.completions
    batch = _empty_batch(assignment, layout, like, split=layout.completions)
    for r, row in enumerate(assignment):
        for e, example in enumerate(row):
            used, prompt = 0, len(example.prompt)
            predicted = sum(map(len, example.completions))
            _require_room("completion tokens", predicted, "source_length", layout.source_length)
            for k, branch in enumerate(example.branches()):
                if not len(branch):
                    continue
                end, start = prompt + len(branch), k * segment + prompt
                _require_room("tokens of a path", end, "segment length", segment)
                _write(batch, r, k * segment, example.prompt, 0, end)
                _write(batch, r, start, branch, prompt, end)
                used = _predict(batch, (r, e, k), used, start - 1, start, branch, example.completions[k])
    return batch


def fill_rate(batch: Batch) -> float:
    """Share of the places of a batch that hold a token."""
    return float(np.mean(np.asarray(batch.subtree_end) > 0))


def _total(example: Example) -> int:
    return len(example.prompt) + sum(map(len, example.branches()))


def _write(batch: Batch, row: int, start: int, ids: np.ndarray, position: int, end: int) -> None:
    """Put one node of a tree at `start`; its path positions begin at `position`, its subtree ends at `end`."""
    places = slice(start, start + len(ids))
    batch.tokens[row, places] = ids
    batch.positions[row, places] = np.arange(position, position + len(ids))
    batch.subtree_end[row, places] = end


def _predict(
    batch: Batch,
    place: tuple[int, int, int],
    used: int,
    last_prompt: int,
    start: int,
    branch: np.ndarray,
    completion: np.ndarray,
) -> int:
    """Enter the predictions of a completion that ends a branch, from slot `used` on; returns the next free slot.

    The first token of a branch comes from the last prompt token, which need not stand before it.
    """
    if not len(completion):
        return used
    first, end = start + len(branch) - len(completion), start + len(branch)
    slots = slice(used, used + len(completion))
    batch.source[place[0], slots] = np.arange(first - 1, end - 1)
    if first == start:
        batch.source[place[0], used] = last_prompt
    batch.target[place[0], slots] = completion
    batch.slots[*place, : len(completion)] = np.arange(used, used + len(completion))
    batch.ends[place] = end - 1
    return used + len(completion)


def _empty_batch(assignment: Sequence[Sequence[Example]], layout: Layout, like: Example | None, *, split: int) -> Batch:
    """A batch with weights and columns but no tokens yet, after the checks that need no index."""
    rows, places, k, t = layout.rows, layout.examples, layout.completions, layout.completion_length
    _require_room("rows", len(assignment), "rows", rows)
    weight = np.zeros((rows, places), np.float32)
    for r, row in enumerate(assignment):
        _require_room("examples in a row", len(row), "examples", places)
        weight[r, : len(row)] = 1
        for example in row:
            if len(example.completions) != k:
                raise ValueError(f"an example has {len(example.completions)} completions; the layout has {k}")
            if not len(example.prompt) or not any(map(len, example.completions)):
                raise ValueError("an example has an empty prompt or no completion; each needs at least one token")
            _require_room("tokens of a completion", max(map(len, example.completions)), "completion_length", t)

    def zeros(*shape: int, fill: int = 0) -> np.ndarray:
        return np.full(shape, fill, np.int32)

    return Batch(
        tokens=zeros(rows, layout.length),
        positions=zeros(rows, layout.length),
        subtree_end=zeros(rows, layout.length),
        source=zeros(rows, layout.source_length),
        target=zeros(rows, layout.source_length, fill=IGNORE),
        slots=zeros(rows, places, k, t, fill=-1),
        ends=zeros(rows, places, k, fill=-1),
        weight=weight,
        columns=_columns(assignment, layout, like),
        split=split,
    )


def _columns(assignment: Sequence[Sequence[Example]], layout: Layout, like: Example | None) -> dict[str, np.ndarray]:
    """Columns of all places, [R, E, ...]; what runs over tokens is padded to T."""
    like = like or next((example for row in assignment for example in row), None)
    if like is None:
        return {}
    columns = {name: _empty_column(name, np.asarray(value), layout) for name, value in like.columns.items()}
    for r, row in enumerate(assignment):
        for e, example in enumerate(row):
            if example.columns.keys() != columns.keys():
                raise ValueError(f"an example has the columns {sorted(example.columns)}, others {sorted(columns)}")
            for name, value in example.columns.items():
                _put_column(name, columns[name][r, e, ...], np.asarray(value), layout)
    return columns


def _empty_column(name: str, value: np.ndarray, layout: Layout) -> np.ndarray:
    dtype = _NARROW.get(value.dtype.name, value.dtype)
    if is_per_token(name, value, layout.completions):
        shape = (*value.shape[:-1], layout.completion_length)
        return np.full((layout.rows, layout.examples, *shape), outside(dtype), dtype)
    return np.zeros((layout.rows, layout.examples, *value.shape), dtype)


def _put_column(name: str, place: np.ndarray, value: np.ndarray, layout: Layout) -> None:
    per_token = is_per_token(name, value, layout.completions)
    fits = place.shape[:-1] == value.shape[:-1] and value.shape[-1] <= place.shape[-1] if per_token else False
    if not (fits or place.shape == value.shape) or not np.can_cast(value.dtype, place.dtype, "same_kind"):
        found, expected = f"{value.dtype} {list(value.shape)}", f"{place.dtype} {list(place.shape)}"
        raise ValueError(f"column {name!r} is {found} in one example and should be {expected}")
    place[(..., slice(value.shape[-1])) if fits else ...] = value


def _require_room(what: str, needed: int, name: str, room: int) -> None:
    if needed > room:
        raise ValueError(f"{needed} {what} do not fit the layout's {name} {room}; plan a layout for these examples")
