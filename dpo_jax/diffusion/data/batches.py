"""Deterministic batches of images: which rows meet in a step, and a resumable stream of them.

What a batch holds is a function of (seed, step) and the examples alone. All images of a batch have one size: batches
are dealt inside of buckets, and each bucket's size is compiled once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_jax.diffusion.types import DiffusionBatch, TextCondition

Store = Mapping[str, Mapping[str, np.ndarray]]  # key -> arrays: a `cache.Cache`, or a dict


@dataclass(frozen=True)
class ImageExample:
    """One row: keys of its K images and of its captions.

    Attributes:
      images: keys of entries `latents` [H, W, C] and, if the autoencoder has a posterior, `spread` like it.
      captions: keys of entries `states` [L, D] and, if the model wants one, `pooled` [P]; one for all images, or K.
      bucket: rows of one bucket may share a batch.
      sizes: float32 [K, 6] for models that are told sizes, or None.
      columns: name -> number or array.
      frames: F of each image, if they are videos: `images` has the frames of the first, then those of the next.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    bucket: tuple[int, ...] = ()
    sizes: np.ndarray | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    frames: int = 1


def steps_per_epoch(examples: Sequence[ImageExample], batch_size: int) -> int:
    """Batches that hold every example once; the last one of each bucket may have empty places."""
    return sum(-(-len(places) // batch_size) for places in _buckets(examples).values())


def _buckets(examples: Sequence[ImageExample]) -> dict[tuple[int, ...], list[int]]:
    buckets: dict[tuple[int, ...], list[int]] = {}
    for place, example in enumerate(examples):
        buckets.setdefault(example.bucket, []).append(place)
    return buckets


def deal(examples: Sequence[ImageExample], *, batch_size: int, seed: int | None, epoch: int = 0) -> list[np.ndarray]:
    """The batches of an epoch, as places of examples with -1 for empty places, each [batch_size].

    Args:
      seed: of the shuffling; None keeps the order of the examples inside of buckets (evaluation).
      epoch: epochs differ.
    """
    random = None if seed is None else np.random.default_rng([seed, epoch])
    dealt = []
    for places in _buckets(examples).values():
        order = np.array(places) if random is None else random.permutation(places)
        short = -len(order) % batch_size
        dealt += list(np.concatenate([order, np.full(short, -1)]).reshape(-1, batch_size))
    return dealt if random is None else [dealt[i] for i in random.permutation(len(dealt))]


def collate(
    examples: Sequence[ImageExample],
    places: np.ndarray,
    store: Store,
    *,
    filler: int,
    captions: Sequence[tuple[str, ...]] | None = None,
    seeds: np.ndarray | None = None,
) -> DiffusionBatch:
    """A batch of the examples at some places; -1 is an empty place.

    Args:
      filler: place of the example whose images stand, with weight 0, at empty places.
      captions: of each place instead of the examples' own, where captions are dropped.
      seeds: uint32 [B] of the rows' draws.
    """
    rows = [examples[place if place >= 0 else filler] for place in places]
    entries = [[store[key] for key in row.images] for row in rows]
    texts = [[store[key] for key in keys] for keys in captions or [row.captions for row in rows]]

    def stacked(parts: list[list[Mapping[str, np.ndarray]]], name: str) -> np.ndarray | None:
        if name not in parts[0][0]:
            return None
        return np.stack([np.stack([entry[name] for entry in row]) for row in parts])

    latents, states = stacked(entries, "latents"), stacked(texts, "states")
    assert latents is not None and states is not None
    sizes = None if rows[0].sizes is None else np.stack([np.asarray(row.sizes, np.float32) for row in rows])
    columns = {name: np.stack([np.asarray(row.columns[name]) for row in rows]) for name in rows[0].columns}
    columns = {name: x.astype(np.float32 if x.dtype.kind == "f" else np.int32) for name, x in columns.items()}
    spread, frames = stacked(entries, "spread"), rows[0].frames
    if frames > 1:
        latents, spread = (
            None if x is None else x.reshape(len(rows), -1, frames, *x.shape[2:]) for x in (latents, spread)
        )
        assert latents is not None
    return DiffusionBatch(
        latents=latents,
        condition=TextCondition(states, stacked(texts, "pooled"), sizes, stacked(texts, "mask")),
        weight=(places >= 0).astype(np.float32),
        columns=columns,
        spread=spread,
        seeds=seeds,
    )


def batches(
    examples: Sequence[ImageExample],
    store: Store,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    caption_dropout: float = 0.0,
    empty: str | None = None,
) -> Iterator[DiffusionBatch]:
    """An endless stream of this process's rows of the batches from a step on.

    Args:
      batch_size: rows of a batch over all processes.
      caption_dropout: probability that all captions of a row become the empty one, drawn anew for every step.
      empty: key of the empty caption.

    Raises:
      ValueError: a batch that does not fall evenly on the processes; captions to drop, but no empty one.
    """
    if caption_dropout and empty is None:
        raise ValueError(f"caption_dropout is {caption_dropout}, but there is no empty caption to put there")
    share = _share(batch_size, host, hosts)
    count, step = steps_per_epoch(examples, batch_size), start_step
    while True:
        dealt = deal(examples, batch_size=batch_size, seed=seed, epoch=step // count)
        for places in dealt[step % count :]:
            captions = [examples[place if place >= 0 else places.max()].captions for place in places]
            if empty is not None and caption_dropout:
                dropped = np.random.default_rng([seed, step, 1]).random(batch_size) < caption_dropout
                captions = [(empty,) * len(keys) if gone else keys for keys, gone in zip(captions, dropped)]
            seeds = np.random.default_rng([seed, step, 2]).integers(2**32, size=batch_size, dtype=np.uint32)
            filler = int(places.max())
            yield collate(examples, places[share], store, filler=filler, captions=captions[share], seeds=seeds[share])
            step += 1


def epoch_batches(
    examples: Sequence[ImageExample], store: Store, *, batch_size: int, host: int = 0, hosts: int = 1
) -> Iterator[DiffusionBatch]:
    """This process's rows of batches that hold every example once, in order; its place is an example's seed."""
    share = _share(batch_size, host, hosts)
    for places in deal(examples, batch_size=batch_size, seed=None):
        seeds = places[share].astype(np.uint32)
        yield collate(examples, places[share], store, filler=int(places.max()), seeds=seeds)


def _share(batch_size: int, host: int, hosts: int) -> slice:
    if batch_size % hosts:
        raise ValueError(f"batches of {batch_size} do not fall evenly on {hosts} processes; give a multiple of them")
    size = batch_size // hosts
    return slice(host * size, (host + 1) * size)
