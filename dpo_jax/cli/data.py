"""From files to the examples and layouts of a run, with every loss on the way counted and reported."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.cli.configs import DataConfig
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.models import open_model
from dpo_jax.cli.processes import is_first, true_everywhere
from dpo_jax.language.data.annotate import (
    content_key,
    load_logps,
    save_logps,
    token_logps_of,
    with_reference_logps,
)
from dpo_jax.language.data.batches import (
    LayoutPlan,
    epoch_batches,
    plan_layout,
    plan_padded_layout,
    split_examples,
    steps_per_epoch,
)
from dpo_jax.language.data.encode import encode_rows
from dpo_jax.language.data.pack import Layout, example_lengths
from dpo_jax.language.data.rows import SkippedRow, read_rows
from dpo_jax.language.types import Example

SKIPPED_FILE = "skipped_rows.jsonl"


@dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Attributes:
      train, held_out: examples.
      layout, held_out_layout: their static shapes; None where nothing is held out.
      fill_rate: share of token places that hold a token, over the planned steps.
      steps: optimizer steps of the run.
    """

    train: list[Example]
    held_out: list[Example]
    layout: Layout
    held_out_layout: Layout | None
    fill_rate: float
    steps: int


def read_examples(paths: Sequence[str], tokenizer: Any, config: DataConfig, out: Path | None) -> list[Example]:
    """Read, check and encode rows; says what was cut and dropped, lists skipped rows in the run's folder.

    Raises:
      RowError: a bad row, unless they are skipped.
      ValueError: no row is left.
    """
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise UsageError(f"no such file: {', '.join(missing)}")
    rows, skipped = read_rows(paths, on_bad_row=config.on_bad_row)
    if skipped:
        report_skipped(skipped, out)
    if not rows:
        raise ValueError(f"{', '.join(paths)}: no good row is left")
    examples, report = encode_rows(
        rows,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation,
    )
    say(f"{', '.join(paths)}: {report}")
    if not examples:
        raise ValueError(f"{', '.join(paths)}: no example is left after encoding; raise --max-length")
    return examples


def report_skipped(skipped: Sequence[SkippedRow], out: Path | None) -> None:
    """Say how many rows were skipped and list them all in the run's folder."""
    where = ""
    if out is not None and is_first():
        out.mkdir(parents=True, exist_ok=True)
        (out / SKIPPED_FILE).write_text("".join(json.dumps(row._asdict()) + "\n" for row in skipped))
        where = f", listed in {out / SKIPPED_FILE}"
    first = skipped[0]
    say(f"{len(skipped)} bad rows skipped{where}; the first: {first.file}, row {first.number}: {first.reason}")


def layout_of(
    examples: Sequence[Example],
    *,
    batch_size: int,
    row_multiple: int,
    seed: int | None,
    padded: bool,
    steps: int | None = None,
) -> LayoutPlan:
    """Static shapes of packed or padded batches."""
    lengths = example_lengths(examples)
    if padded:
        return plan_padded_layout(lengths, batch_size=batch_size, row_multiple=row_multiple)
    return plan_layout(lengths, batch_size=batch_size, row_multiple=row_multiple, seed=seed, steps=steps)


def prepare(config: Any, tokenizer: Any, out: Path, *, row_multiple: int) -> Prepared:
    """Examples, split and shapes of a training run."""
    examples = read_examples(config.data.data, tokenizer, config.data, out)
    if config.data.eval_data:
        train, held_out = examples, read_examples(config.data.eval_data, tokenizer, config.data, None)
    elif config.data.held_out:
        train, held_out = split_examples(examples, held_out=config.data.held_out, seed=config.loop.seed)
    else:
        train, held_out = examples, []
    if not train:
        raise ValueError(f"all {len(examples)} examples are held out; lower --held-out")
    size = config.loop.batch_size
    steps = config.loop.steps or max(1, round(config.loop.epochs * steps_per_epoch(len(train), size)))
    padded = config.data.layout == "padded"
    plan = layout_of(
        train, batch_size=size, row_multiple=row_multiple, seed=config.loop.seed, padded=padded, steps=steps
    )
    held_out_plan = None
    if held_out:
        held_out_plan = layout_of(held_out, batch_size=size, row_multiple=row_multiple, seed=None, padded=padded)
    shapes = plan.layout
    say(
        f"{len(train)} examples to train on, {len(held_out)} held out; {steps} steps of {size} in {shapes.rows} "
        f"rows of {shapes.length} tokens, fill rate {plan.fill_rate:.3f}"
    )
    return Prepared(
        train, held_out, plan.layout, held_out_plan.layout if held_out_plan else None, plan.fill_rate, steps
    )


def annotate_reference(data: Prepared, config: Any, mesh: Mesh, out: Path) -> Prepared:
    """The reference's log-probs as columns of all examples, computed once and kept in the run's folder."""
    source = config.model.reference_model or config.model.model
    model = open_model(source, config.model)
    variables: Any = None

    def annotated(examples: list[Example], layout: Layout) -> list[Example]:
        nonlocal variables
        # What the numbers depend on: the weights, the type they are computed in, and every token.
        key = content_key(f"{model.fingerprint()} {config.model.dtype} {config.model.param_dtype}", examples)
        path = out / f"reference_logps_{key}.npz"
        logps = load_logps(path, examples)
        # The other processes may see no such file; to compute takes all of them.
        if not true_everywhere(logps is not None):
            variables = model.load(mesh) if variables is None else variables
            stream = epoch_batches(
                examples,
                layout,
                batch_size=config.loop.batch_size,
                host=jax.process_index(),
                hosts=jax.process_count(),
                padded=config.data.layout == "padded",
            )
            logps = token_logps_of(model.apply_fn, variables, stream, mesh)
            if is_first():
                save_logps(path, logps, examples)
            say(f"reference log-probs of {len(examples)} examples computed and kept in {path}")
        else:
            say(f"reference log-probs of {len(examples)} examples read from {path}")
        assert logps is not None
        return with_reference_logps(examples, logps)

    size, padded = config.loop.batch_size, config.data.layout == "padded"
    plan = layout_of(data.train, batch_size=size, row_multiple=data.layout.rows, seed=None, padded=padded)
    train = annotated(data.train, plan.layout)
    held_out = annotated(data.held_out, data.held_out_layout) if data.held_out_layout else []
    return replace(data, train=train, held_out=held_out)
