"""Which examples meet in a step and on which rows, and the static shapes that hold every step.

Examples are dealt by their lengths alone. Batches of an epoch have nearly equal token totals, so that one static shape
serves all of them almost without padding.
"""

from typing import NamedTuple

import numpy as np

from dpo_jax.language.data.pack import Layout, Lengths

# From this fill rate of full batches on, shorter rows are worth more than fuller ones. It leaves room for a last,
# partial batch: what is measured over an epoch should stay above 0.97.
ENOUGH_FILL = 0.975
# Lengths are sorted up to this relative noise (standard deviation of the logarithm) before they are dealt: without it
# the same examples would meet in every epoch, with much more of it the totals differ.
ORDER_NOISE = 0.1
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
      seed: as for `deal_examples`; None for evaluation (`batches.epoch_batches`).
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
