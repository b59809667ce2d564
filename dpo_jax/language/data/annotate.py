"""Columns from frozen models: what a model says about a fixed row is computed once and travels with the row."""

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax.language.data.batches import BatchSource
from dpo_jax.language.methods.cdpo_critical import contrastive_token_scores
from dpo_jax.language.methods.sem_dpo import semantic_distance
from dpo_jax.language.methods.tree_po import align_steps, step_similarity
from dpo_jax.language.score import completion_mask, gather_rows, predict, rewards, score, to_examples
from dpo_jax.language.types import Batch, Example, Prediction
from dpo_jax.sharding import shard_batch
from dpo_jax.types import PyTree

CHUNK = 128  # tokens whose logits over the vocabulary exist at a time


def each_example(
    function: Callable[[PyTree, Batch], jax.Array], variables: PyTree, source: BatchSource, mesh: Mesh
) -> list[np.ndarray]:
    """What a function of frozen models and a batch says of each example of a source, the same on every process.

    Args:
      function: `(variables, batch) -> [B, ...]`.
      variables: of the models.
      source: from `epoch_batches`: each example once.
    """

    def run(variables: PyTree, batch: Batch) -> jax.Array:
        values = function(variables, batch)
        return values.reshape(*batch.weight.shape, *values.shape[1:])  # [B, ...] -> [R, E, ...]

    step = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))
    results = [np.zeros(0, np.float32)] * len(source.examples)
    with jax.set_mesh(mesh):
        for number in range(len(source)):
            values = np.asarray(step(variables, shard_batch(source[number], mesh)))
            places = source.places(number)
            for row, place in zip(*np.nonzero(places >= 0)):
                results[places[row, place]] = values[row, place]
    return results


def token_logps(apply_fn: Callable, variables: PyTree, batch: Batch) -> jax.Array:
    """Log-probability of every completion token under a frozen model, [B, K, T], zero where there is no token."""
    return score(partial(apply_fn, variables), batch, frozen_head=True)["logps"]


def completion_rewards(apply_fn: Callable, variables: PyTree, batch: Batch) -> jax.Array:
    """What a reward model says of every completion, [B, K], zero where there is none."""
    return rewards(partial(apply_fn, variables), batch)


def contrastive_logps(apply_fn: Callable, variables: PyTree, batch: Batch, *, contrast: float = 1.0) -> jax.Array:
    """log softmax_v[(1 + c) log p(v) - c log n(v)] of every completion token, [B, K, T], for two frozen models.

    Lin et al. 2024, arXiv 2411.19943, eq. 3.

    Args:
      variables: of the positive and of the negative model, `(p, n)`.
      contrast: the paper's c.
    """
    source, target = jnp.asarray(batch.source), jnp.asarray(batch.target)
    answers = [_prediction(apply_fn, v, batch) for v in variables]
    hidden = [gather_rows(a.hidden, source).reshape(-1, a.hidden.shape[-1]) for a in answers]
    targets = jnp.maximum(target, 0).reshape(-1)

    def one(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        positive, negative = (
            _logits(state, answer.head, answer.bias, answer.softcap) for state, answer in zip(token[:2], answers)
        )
        return contrastive_token_scores(
            positive_logits=positive, negative_logits=negative, labels=token[2], contrast=contrast
        )

    # Chunks of tokens: the logits of two models at all places would not fit.
    values = jax.lax.map(one, (hidden[0], hidden[1], targets), batch_size=CHUNK)
    return to_examples(values.reshape(source.shape), batch)


def _prediction(apply_fn: Callable, variables: PyTree, batch: Batch) -> Prediction:
    answer = predict(partial(apply_fn, variables), batch)
    if not isinstance(answer, Prediction):
        raise ValueError("this column needs a model that answers a Prediction, not plain logits")
    return answer


def _logits(hidden: jax.Array, head: jax.Array, bias: jax.Array | None, softcap: float | None) -> jax.Array:
    logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T
    logits = logits if bias is None else logits + bias
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def token_states(apply_fn: Callable, variables: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Last hidden states at completion tokens, float32 [B, K, T, D], and their mask [B, K, T]."""
    mask = completion_mask(batch).reshape(*batch.slots.shape)  # [R, E, K, T]
    count = jnp.sum(mask, -1, keepdims=True).astype(jnp.int32)
    place = jnp.asarray(batch.ends)[..., None] - count + 1 + jnp.arange(mask.shape[-1])
    states = gather_rows(_prediction(apply_fn, variables, batch).hidden, jnp.where(mask > 0, place, 0))
    states = jnp.where(mask[..., None] > 0, states.astype(jnp.float32), 0.0)
    return states.reshape(-1, *states.shape[2:]), mask.reshape(-1, *mask.shape[2:])


def first_two_distance(apply_fn: Callable, variables: PyTree, batch: Batch) -> jax.Array:
    """Cosine distance in [0, 2] between the mean states of completions 0 and 1, [B]."""
    states, mask = token_states(apply_fn, variables, batch)
    means = jnp.sum(states, -2) / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return semantic_distance(means[:, 0], means[:, 1])


def step_similarities(apply_fn: Callable, variables: PyTree, batch: Batch, *, steps: int) -> jax.Array:
    """Cosine similarity of the mean states of steps, [B, K, K, steps], for every two completions of an example.

    Steps are aligned as the loss aligns them. Zero where one of the two has no such step. Liao et al. 2024,
    arXiv 2410.12854.
    """
    states, mask = token_states(apply_fn, variables, batch)
    step_ids = jnp.asarray(batch.columns["step_ids"]).reshape(mask.shape)
    return step_similarity(states, align_steps(step_ids, mask, num_steps=steps), num_steps=steps)


def prompt_and_chosen(example: Example) -> Example:
    """The prompt and the first completion as two completions of its first token, to be compared."""
    prompt = example.prompt[1:] if len(example.prompt) > 1 else example.prompt
    return Example(example.prompt[:1], (prompt, example.completions[0]))


def with_column(examples: Sequence[Example], name: str, values: Sequence[np.ndarray]) -> list[Example]:
    """The examples with one more column."""
    return [replace(e, columns={**e.columns, name: v}) for e, v in zip(examples, values, strict=True)]


def to_longest(examples: Sequence[Example], values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Values per token [K, T], cut to the longest completion of each example."""
    return [np.asarray(v[:, : max(map(len, e.completions))], np.float32) for e, v in zip(examples, values, strict=True)]


def content_key(model: str, examples: Sequence[Example]) -> str:
    """Hash of a model's fingerprint and of all token ids: what cached log-probabilities depend on."""
    digest = hashlib.blake2b(model.encode(), digest_size=12)
    for example in examples:
        for ids in (example.prompt, *example.branches()):
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
