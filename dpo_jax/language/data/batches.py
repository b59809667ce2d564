"""Deterministic batches: a resumable stream of them, and the one pass of an evaluation.

What a batch holds is a function of (seed, step) and the examples alone: neither the number of rows nor of hosts changes
it (`dealing`).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dpo_jax.language.data.dealing import assign_rows, deal_examples, steps_per_epoch
from dpo_jax.language.data.pack import Layout, example_lengths, pack_rows, pad_rows
from dpo_jax.language.types import Batch, Example

ENDLESS = 2**40  # steps of a training stream


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
      layout: from `dealing.plan_layout`, or `plan_padded_layout` if padded.
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
