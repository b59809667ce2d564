"""dpo_jax as a contender in a side-by-side DPO benchmark of libraries on the same weights and token ids.

A harness calls `contender(work, rec)`: `work` names two Llama folders (`policy_dir`, `ref_dir`), the pairs as
token ids, `pairs_per_step`, `beta` and `learning_rate`; `rec.ready()` ends the set-up, `rec.step(loss)` each step.
Every step trains on the same pairs as the others do: packed into prefix trees, in which a prompt stands once.
`contender_padded` is the same with one padded row for each completion.
"""

import jax
import numpy as np
import optax

from dpo_jax.language.data.pack import Layout, pack_rows, pad_rows
from dpo_jax.language.methods import dpo_loss
from dpo_jax.language.models.decoder import RULES, decoder_function
from dpo_jax.language.models.weights import load_hf
from dpo_jax.language.objectives import from_loss
from dpo_jax.language.types import Batch, Example
from dpo_jax.sharding import make_mesh, shard_batch
from dpo_jax.train import compile_step, init_state, make_train_step


def examples_of(work) -> list[Example]:
    """The harness's pairs."""

    def ids(row: dict, key: str) -> np.ndarray:
        return np.asarray(row[f"{key}_ids"], np.int32)

    return [Example(ids(row, "prompt"), (ids(row, "chosen"), ids(row, "rejected"))) for row in work.pairs]


def packed_batches(work, rows: int = 4) -> list[Batch]:
    """One batch for each step: its pairs dealt to a few rows, longest first to the shortest row."""
    examples, size = examples_of(work), work.pairs_per_step

    def length(example: Example) -> int:
        return len(example.prompt) + sum(map(len, example.completions))

    dealt = []
    for start in range(0, size * work.steps, size):
        row: list[list[Example]] = [[] for _ in range(rows)]
        for example in sorted(examples[start : start + size], key=length, reverse=True):
            min(row, key=lambda r: sum(map(length, r))).append(example)
        dealt.append(row)
    every = [row for batch in dealt for row in batch]
    layout = Layout(
        rows=rows,
        length=-(-max(sum(map(length, row)) for row in every) // 16) * 16,
        source_length=max(sum(len(c) for e in row for c in e.completions) for row in every),
        examples=max(map(len, every)),
        completions=2,
        completion_length=max(len(c) for e in examples for c in e.completions),
    )
    return [pack_rows(batch, layout) for batch in dealt]


def padded_batches(work) -> list[Batch]:
    """One batch for each step, prompt and completion padded to the widths of the work."""
    examples, size = examples_of(work), work.pairs_per_step
    layout = Layout(
        rows=size,
        length=2 * (work.max_prompt + work.max_completion),
        source_length=2 * work.max_completion,
        examples=1,
        completions=2,
        completion_length=work.max_completion,
    )
    return [pad_rows([[e] for e in examples[i : i + size]], layout) for i in range(0, size * work.steps, size)]


def run(work, rec, batches: list[Batch]) -> None:
    """Train on one device with float32 AdamW, policy and frozen reference in one jitted step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    config, policy = load_hf(work.policy_dir, mesh=mesh)
    _, reference = load_hf(work.ref_dir, mesh=mesh)
    apply_fn = decoder_function(config)
    optimizer = optax.adamw(work.learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    state = init_state(policy, optimizer, jax.random.key(0), reference=reference)
    step = make_train_step(from_loss(dpo_loss, beta=work.beta), apply_fn, optimizer)
    step, state = compile_step(step, state, mesh, RULES)
    rec.ready()
    for batch in batches:
        state, metrics = step(state, shard_batch(batch, mesh))
        rec.step(metrics["loss"])


def contender(work, rec) -> None:
    """Packed prefix trees."""
    rec.watch_jax()
    run(work, rec, packed_batches(work))


def contender_padded(work, rec) -> None:
    """Plain padded rows."""
    rec.watch_jax()
    run(work, rec, padded_batches(work))
