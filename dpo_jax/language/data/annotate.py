"""Columns from frozen models: what a model says about a fixed row is computed once and travels with the row."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.language.data.batches import BatchSource
from dpo_jax.language.score import score
from dpo_jax.language.types import Batch, Example
from dpo_jax.sharding import shard_batch
from dpo_jax.types import PyTree


def token_logps_of(apply_fn: Callable, variables: PyTree, source: BatchSource, mesh: Mesh) -> list[np.ndarray]:
    """Log-probabilities of every completion token under a frozen model.

    Args:
      apply_fn, variables: the model.
      source: from `epoch_batches`: each example once.

    Returns:
      float32 [K, T] for each example of the source, zero where there is no token, the same on every process.
    """

    def run(variables: PyTree, batch: Batch) -> jax.Array:
        logps = score(partial(apply_fn, variables), batch, frozen_head=True)["logps"]
        return logps.reshape(*batch.weight.shape, *logps.shape[1:])  # [B, K, T] -> [R, E, K, T]

    step = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
    results = [np.zeros((0, 0), np.float32)] * len(source.examples)
    with jax.set_mesh(mesh):
        for number in range(len(source)):
            logps = np.asarray(step(variables, shard_batch(source[number], mesh)))
            places = source.places(number)
            for row, place in zip(*np.nonzero(places >= 0)):
                results[places[row, place]] = logps[row, place]
    return results


def with_reference_logps(examples: Sequence[Example], logps: Sequence[np.ndarray]) -> list[Example]:
    """The examples with a column `reference_logps` [K, C], C the longest completion of the example."""
    marked = []
    for example, values in zip(examples, logps, strict=True):
        longest = max(map(len, example.completions))
        column = np.asarray(values[:, :longest], np.float32)
        marked.append(replace(example, columns={**example.columns, "reference_logps": column}))
    return marked


def content_key(model: str, examples: Sequence[Example]) -> str:
    """Hash of a model's fingerprint and of all token ids: what cached log-probabilities depend on."""
    digest = hashlib.blake2b(model.encode(), digest_size=12)
    for example in examples:
        for ids in (example.prompt, *example.completions):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(ids, np.int32).tobytes())
    return digest.hexdigest()


def save_logps(path: Path, logps: Sequence[np.ndarray], examples: Sequence[Example]) -> None:
    """Write log-probabilities to an npz file, ragged lengths as one flat array; appears whole or not at all."""
    flat = [
        values[k, : len(ids)]
        for values, example in zip(logps, examples, strict=True)
        for k, ids in enumerate(example.completions)
    ]
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, logps=np.concatenate(flat).astype(np.float32))
    partial.replace(path)


def load_logps(path: Path, examples: Sequence[Example]) -> list[np.ndarray] | None:
    """Read back what `save_logps` wrote for the same examples; None if there is no such file or it does not fit."""
    lengths = [[len(ids) for ids in example.completions] for example in examples]
    try:
        flat = np.load(path)["logps"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if flat.shape != (sum(map(sum, lengths)),):
        return None
    results, start = [], 0
    for sizes in lengths:
        values = np.zeros((len(sizes), max(sizes)), np.float32)
        for k, size in enumerate(sizes):
            values[k, :size] = flat[start : start + size]
            start += size
        results.append(values)
    return results
