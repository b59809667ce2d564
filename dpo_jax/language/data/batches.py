"""Deterministic batches: which examples meet in a step, on which rows, and a resumable stream of them.

What a batch holds is a function of (seed, step) and the examples alone: neither the number of rows nor of hosts changes
it. Batches of an epoch have nearly equal token totals, so that one static shape serves all of them almost without
padding.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dpo_jax.language.data.pack import Layout, Lengths, example_lengths, pack_rows, pad_rows
from dpo_jax.language.types import Batch, Example

# From this fill rate of full batches on, shorter rows are worth more than fuller ones. It leaves room for a last,
# partial batch: what is measured over an epoch should stay above 0.97.
ENOUGH_FILL = 0.975
# Lengths are sorted up to this relative noise (standard deviation of the logarithm) before they are dealt: without it
# the same examples would meet in every epoch, with much more of it the totals differ.
ORDER_NOISE = 0.1
ENDLESS = 2**40  # steps of a training stream
PREVIEW = 1024  # batches on which all row counts are compared before the most promising is checked on all


class LayoutPlan(NamedTuple):
    """A layout and what it is expected to waste.

    Attributes:
      layout: static shapes that hold every batch of the planned steps.
      fill_rate: share of the R * L token places that hold a token, over those steps.
      source_fill_rate: the same for the R * S places of predicted tokens.
    """

    layout: Layout
    fill_rate: float
    source_fill_rate: float


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches that hold every example once; the last one may have empty places."""
    return -(-examples // batch_size)


def deal_examples(lengths: Lengths, *, batch_size: int, seed: int | None, epoch: int = 0) -> np.ndarray:
    """Deal the examples of an epoch to its batches.

    The examples are shuffled. The last N mod batch_size of them are the last, partial batch; the others are sorted by
    length and dealt in batch_size rounds, in each of which the longest goes to the batch with the fewest tokens, or
    the one with the longest completions to the batch with the fewest completion tokens. Then the batches are shuffled.
    Time O(N log N).

    Args:
      lengths: of the N examples.
      batch_size: examples of a batch.
      seed: of the shuffling; None keeps the order of the examples (evaluation).
      epoch: epochs differ.

    Returns:
      int64 [steps_per_epoch, batch_size] indices of examples, each exactly once, -1 at empty places.
    """
    count = len(lengths.prompt)
    full = count // batch_size
    batches = np.full((steps_per_epoch(count, batch_size), batch_size), -1, np.int64)
    if seed is None:
        batches.reshape(-1)[:count] = np.arange(count)
        return batches
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    dealt, rest = order[: full * batch_size], order[full * batch_size :]
    batches[full:, : len(rest)] = rest
    sizes = np.stack([lengths.total, lengths.completions.sum(1)])  # [2, N]
    sums = np.zeros((2, full), np.int64)
    keys = np.log(sizes[0, dealt]) + ORDER_NOISE * random.standard_normal(len(dealt))
    for number, some in enumerate(dealt[np.argsort(-keys, kind="stable")].reshape(batch_size, full)):
        # Examples of a middle round are about equally long, so every other one is free to even out the completions; the
        # first and last rounds, and all rounds of a small batch, are needed for the totals.
        middle = batch_size // 4 <= number < batch_size - batch_size // 4
        even_out = int(batch_size >= 16 and middle and number % 2 == 1)
        largest_first = some[np.argsort(-sizes[even_out, some], kind="stable")]
        emptiest_first = np.argsort(sums[even_out], kind="stable")
        batches[emptiest_first, number] = largest_first
        sums[:, emptiest_first] += sizes[:, largest_first]
    batches[:full] = batches[random.permutation(full)]
    return batches


def assign_rows(totals: np.ndarray, rows: int) -> np.ndarray:
    """Row of each example of a batch: the longest first, each to the row with the fewest tokens.

    Args:
      totals: integer [N, batch_size] tokens of the examples of N batches, 0 at empty places.
      rows: R.

    Returns:
      int64 [N, batch_size] in [0, R), -1 at empty places.
    """
    order = np.argsort(-totals, axis=1, kind="stable")
    result, loads = np.full(totals.shape, -1, np.int64), np.zeros((len(totals), rows), np.int64)
    every = np.arange(len(totals))
    for place in order.T:
        row, tokens = loads.argmin(1), totals[every, place]
        loads[every, row] += tokens
        result[every, place] = np.where(tokens > 0, row, -1)
    return result


class _Needs(NamedTuple):
    """Maxima of L, S, E over simulated batches, and the tokens, examples and batches that went in."""

    length: int
    source_length: int
    examples: int
    tokens: int
    predicted: int
    present: int
    batches: int

    def join(self, other: "_Needs") -> "_Needs":
        return _Needs(*map(max, self[:3], other[:3]), *(a + b for a, b in zip(self[3:], other[3:])))


def _simulate(lengths: Lengths, batches: np.ndarray, rows: int) -> _Needs:
    """Lay out batches of example indices [N, batch_size] by their lengths alone."""
    there = batches >= 0
    totals = np.where(there, lengths.total[batches], 0)
    predicted = np.where(there, lengths.completions.sum(1)[batches], 0)
    row = assign_rows(totals, rows)
    places = (np.arange(len(batches))[:, None] * rows + row)[there]

    def largest(values: np.ndarray) -> int:
        return int(np.bincount(places, values[there]).max())

    sizes = largest(totals), largest(predicted), largest(there.astype(np.int64))
    return _Needs(*sizes, int(totals.sum()), int(predicted.sum()), int(there.sum()), len(batches))


def _round_length(length: int) -> int:
    """Multiples that kernels like: of 128 for long rows, of 16 for short ones."""
    unit = 128 if length >= 2048 else 16
    return -(-length // unit) * unit


def plan_layout(
    lengths: Lengths,
    *,
    batch_size: int,
    row_multiple: int = 1,
    seed: int | None,
    steps: int | None = None,
    max_row_length: int | None = None,
) -> LayoutPlan:
    """Choose the static shapes of packed batches by dealing all planned steps, on lengths alone.

    Of the numbers of rows, the largest with a fill rate of ENOUGH_FILL wins (attention costs less in short rows); if
    none reaches it, the one with the best fill rate. A last, partial batch has no say in that.

    Args:
      lengths: of all examples.
      batch_size: examples of a batch.
      row_multiple: the number of rows is a multiple of this: shards of the batch times microbatches.
      seed: as for `batches`; None for evaluation (`epoch_batches`).
      steps: steps that must fit; by default one epoch.
      max_row_length: the longest row allowed.

    Raises:
      ValueError: a row longer than max_row_length in every layout.
    """
    if min(batch_size, row_multiple, 1 if steps is None else steps) < 1:
        raise ValueError(f"batch_size {batch_size}, row_multiple {row_multiple} and steps {steps} should be at least 1")
    per_epoch = steps_per_epoch(len(lengths.prompt), batch_size)
    steps = per_epoch if steps is None else steps
    epochs = 1 if seed is None else -(-steps // per_epoch)

    def needs_of(rows: int, dealt: np.ndarray) -> _Needs:
        return _simulate(lengths, dealt, rows)

    def dealt(epoch: int) -> np.ndarray:
        order = deal_examples(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        return order[: steps - epoch * per_epoch]

    def candidate(rows: int, needs: _Needs) -> _Candidate:
        plan = _plan(lengths, rows, needs)
        return _Candidate(plan.fill_rate * needs.batches * batch_size / needs.present, rows, plan)

    first = dealt(0)
    previews = [candidate(rows, needs_of(rows, first[:PREVIEW])) for rows in _row_counts(batch_size, row_multiple)]
    best: _Candidate | None = None
    # Maxima only grow with more batches, so a row count whose preview is too empty needs no full check.
    for preview in sorted(previews, key=_promise, reverse=True):
        if best is not None and preview.fullness <= best.fullness:
            break
        needs = needs_of(preview.rows, first)
        for epoch in range(1, epochs):
            needs = needs.join(needs_of(preview.rows, dealt(epoch)))
        checked = candidate(preview.rows, needs)
        if max_row_length is not None and checked.plan.layout.length > max_row_length:
            continue
        if checked.fullness >= ENOUGH_FILL:
            return checked.plan
        best = checked if best is None else max(best, checked)
    if best is None:
        raise ValueError(
            f"no row of at most {max_row_length} tokens fits batches of {batch_size} examples, the longest of which "
            f"has {int(lengths.total.max())}; cut the examples, or allow longer rows"
        )
    return best.plan


def plan_padded_layout(lengths: Lengths, *, batch_size: int, row_multiple: int = 1) -> LayoutPlan:
    """Shapes of `pad_rows` batches: one example per row, segments as long as the longest path. See `plan_layout`."""
    rows = -(-batch_size // row_multiple) * row_multiple
    count, completions = lengths.completions.shape
    paths = np.where(lengths.branches > 0, lengths.prompt[:, None] + lengths.branches, 0)
    longest = int(lengths.completions.max())
    length, source_length = completions * _round_length(int(paths.max())), completions * longest
    places = steps_per_epoch(count, batch_size) * rows
    fill_rates = paths.sum() / (places * length), lengths.completions.sum() / (places * source_length)
    return LayoutPlan(Layout(rows, length, source_length, 1, completions, longest), *map(float, fill_rates))


def _plan(lengths: Lengths, rows: int, needs: _Needs) -> LayoutPlan:
    length, source_length = _round_length(needs.length), _round_length(needs.source_length)
    completions, longest = lengths.completions.shape[1], int(lengths.completions.max())
    layout = Layout(rows, length, source_length, needs.examples, completions, longest)
    places = needs.batches * rows
    return LayoutPlan(layout, needs.tokens / (places * length), needs.predicted / (places * source_length))


def _row_counts(batch_size: int, row_multiple: int) -> list[int]:
    """Multiples of row_multiple by 1, 2, 3, 4, 6, 8, 12, ..., at most one row per example (but one multiple)."""
    powers = [2**i for i in range(batch_size.bit_length())]
    factors = sorted({1, *powers, *(3 * power // 2 for power in powers[1:])})
    return [row_multiple * f for f in factors if f == 1 or row_multiple * f <= batch_size]


class _Candidate(NamedTuple):
    """A number of rows with its plan; fullness is the fill rate without the empty places of a last, partial batch."""

    fullness: float
    rows: int
    plan: LayoutPlan


def _promise(candidate: _Candidate) -> tuple[bool, float, int]:
    enough = candidate.fullness >= ENOUGH_FILL
    return enough, 0.0 if enough else candidate.fullness, candidate.rows


class BatchSource:
    """Random access to batches: `source[step]` is a function of the step alone, on every host its own rows.

    Attributes:
      examples, layout, batch_size, seed, host, hosts, padded: as given; see `batches`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        layout: Layout,
        *,
        batch_size: int,
        seed: int | None,
        host: int = 0,
        hosts: int = 1,
        padded: bool = False,
    ):
        if layout.rows % hosts or not 0 <= host < hosts:
            raise ValueError(f"{layout.rows} rows do not divide among {hosts} hosts (this is host {host})")
        self.examples, self.layout, self.batch_size, self.seed = examples, layout, batch_size, seed
        self.host, self.hosts, self.padded = host, hosts, padded
        self._lengths = example_lengths(examples)
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()  # the epochs in use, as dealt
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Steps of one epoch for evaluation (seed None); endless for training."""
        return steps_per_epoch(len(self.examples), self.batch_size) if self.seed is None else ENDLESS

    def __getitem__(self, index: int) -> Batch:
        """This host's rows of the batch of the step `index`."""
        rows = self.layout.rows // self.hosts
        assignment = [[self.examples[i] for i in row] for row in self._assignment(index)]
        mine = assignment[self.host * rows : (self.host + 1) * rows]
        build = pad_rows if self.padded else pack_rows
        return build(mine, replace(self.layout, rows=rows), like=self.examples[0])

    def places(self, step: int) -> np.ndarray:
        """Which example stands where: int64 [R, E] indices of the whole batch, on every host; -1 at empty places."""
        places = np.full((self.layout.rows, self.layout.examples), -1, np.int64)
        for row, indices in zip(places, self._assignment(step)):
            row[: len(indices)] = indices
        return places

    def _assignment(self, step: int) -> list[list[int]]:
        """Indices of the examples of each row of the whole batch."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not among the {len(self)} steps")
        epoch, number = divmod(int(step), steps_per_epoch(len(self.examples), self.batch_size))
        batch = self._order(epoch)[number]
        if self.padded:
            rows = np.where(batch >= 0, np.arange(len(batch)), -1)
        else:
            rows = assign_rows(np.where(batch >= 0, self._lengths.total[batch], 0)[None], self.layout.rows)[0]
        result: list[list[int]] = [[] for _ in range(max(self.layout.rows, int(rows.max()) + 1))]
        for index, row in zip(batch, rows):
            if row >= 0:
                result[row].append(int(index))
        return result

    def _order(self, epoch: int) -> np.ndarray:
        # Threads that prefetch may stand in two epochs at once; each epoch is dealt by the first of them.
        with self._lock:
            if epoch not in self._orders:
                if len(self._orders) == 2:
                    self._orders.popitem(last=False)
                dealt = deal_examples(self._lengths, batch_size=self.batch_size, seed=self.seed, epoch=epoch)
                self._orders[epoch] = dealt
            return self._orders[epoch]


class BatchIterator(Iterator[Batch]):
    """Batches from a step on, prefetched by threads; its whole state is the number of the next step."""

    def __init__(self, source: BatchSource, start_step: int = 0, *, threads: int = 2, prefetch: int = 4):
        self._source, self._options = source, (threads, prefetch)
        self._start(start_step)

    def _start(self, step: int) -> None:
        import grain

        if not 0 <= step <= len(self._source):
            raise ValueError(f"step {step} is not in [0, {len(self._source)}]")
        threads, prefetch = self._options
        self.step = step
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._batches = iter(grain.MapDataset.source(self._source)[step:].to_iter_dataset(options))

    def __next__(self) -> Batch:
        """The batch of `self.step`."""
        batch = next(self._batches)
        self.step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a state of `get_state`, as if never interrupted."""
        self._start(int(state["step"]))


def batches(
    examples: Sequence[Example],
    layout: Layout,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    padded: bool = False,
) -> BatchIterator:
    """Endless training batches as NumPy arrays; every example once an epoch.

    Args:
      examples: all examples, on every host.
      layout: from `plan_layout`, or `plan_padded_layout` if padded.
      batch_size: examples of a batch over all hosts.
      seed: with the step it says which examples a batch holds.
      start_step: the first step.
      host, hosts: this host takes the rows [host * R / hosts, (host + 1) * R / hosts).
      padded: one example per row (`pad_rows`) instead of packed rows.

    Raises:
      ValueError: rows that do not divide among the hosts; an example that does not fit the layout (when drawn).
    """
    options = {"batch_size": batch_size, "seed": seed, "host": host, "hosts": hosts, "padded": padded}
    return BatchIterator(BatchSource(examples, layout, **options), start_step)


def epoch_batches(
    examples: Sequence[Example],
    layout: Layout,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    padded: bool = False,
) -> BatchSource:
    """Evaluation batches: a sequence that holds every example once, in the order given; arguments as for `batches`.

    `places(step)` of the result tells which example stands at which place. Plan the layout with seed None.
    """
    return BatchSource(examples, layout, batch_size=batch_size, seed=None, host=host, hosts=hosts, padded=padded)


def split_examples(examples: Sequence[Example], *, held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Two disjoint parts, for training and for evaluation, each in the given order.

    Examples with the same prompt ids stay on one side, so that no prompt is evaluated that was trained on.

    Args:
      held_out: share of the examples, or from 1 on their number; never exceeded, and missed only where groups
        of equal prompts do not fit; 0 holds out none.
      seed: of the choice.

    Raises:
      ValueError: held_out is negative or leaves nothing to train on.
    """
    count = round(held_out * len(examples)) if held_out < 1 else int(held_out)
    if 0 < held_out < 1:
        count = max(count, 1)
    if not 0 <= count < max(len(examples), 1):
        raise ValueError(f"held_out is {held_out}: {count} of {len(examples)} examples; give a smaller part, or 0")
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(np.asarray(example.prompt, np.int32).tobytes(), []).append(index)
    members, chosen = list(groups.values()), set[int]()
    for number in np.random.default_rng(seed).permutation(len(members)):
        if len(chosen) + len(members[number]) <= count:
            chosen.update(members[number])
        if len(chosen) == count:
            break
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [examples[index] for index in sorted(chosen)]
