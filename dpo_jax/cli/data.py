"""From files to the examples and layouts of a run, with every loss on the way counted and reported."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_jax.cli.configs import DataConfig
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.processes import is_first
from dpo_jax.language.data.batches import split_examples
from dpo_jax.language.data.columns import ColumnError, advice, with_columns
from dpo_jax.language.data.dealing import LayoutPlan, plan_layout, plan_padded_layout, steps_per_epoch
from dpo_jax.language.data.encode import encode_rows
from dpo_jax.language.data.forms import FormError, to_form
from dpo_jax.language.data.pack import Layout, example_lengths
from dpo_jax.language.data.rows import Form, PreferenceRow, SkippedRow, read_rows
from dpo_jax.language.objectives import Loss, column_names, form_of, whole_column
from dpo_jax.language.types import Example
from dpo_jax.signatures import read_needs

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


@dataclass(frozen=True)
class Wanted:
    """What a method reads of the data.

    Attributes:
      form: of the rows.
      columns: that only the data can give.
      kept: all columns that it would read, those too that a model gives otherwise.
    """

    form: Form
    columns: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def wanted_by(loss: Loss) -> Wanted:
    """What a loss reads of the data; where one column serves all completions, that one."""
    names = read_needs(loss).arrays
    only = tuple(dict.fromkeys(map(whole_column, column_names(loss))))
    return Wanted(form_of(loss), only, tuple({*names, *map(whole_column, names)}))  # type: ignore[arg-type]


def read_examples(
    paths: Sequence[str], tokenizer: Any, config: DataConfig, out: Path | None, wanted: Wanted, *, seed: int = 0
) -> list[Example]:
    """Read, check and encode rows; says what was cut and dropped, lists skipped rows in the run's folder.

    Raises:
      RowError: a bad row, unless they are skipped.
      UsageError: files that do not exist, rows that cannot take the form that is wanted.
      ValueError: no row is left.
    """
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise UsageError(f"no such file: {', '.join(missing)}")
    rows, skipped = read_rows(paths, on_bad_row=config.on_bad_row)
    if rows:
        rows, left_out = _as_wanted(rows, wanted, config, seed)
        skipped = [*skipped, *left_out]
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
        step_delimiter=config.step_delimiter if "step_ids" in wanted.columns else None,
    )
    say(f"{', '.join(paths)}: {report}")
    if not examples:
        raise ValueError(f"{', '.join(paths)}: no example is left after encoding; raise --max-length")
    return examples


def _as_wanted(
    rows: list[PreferenceRow], wanted: Wanted, config: DataConfig, seed: int
) -> tuple[list[PreferenceRow], list[SkippedRow]]:
    """Rows of the form and with the columns that a method reads, and those that have none."""
    before, given = rows[0].form, len(rows)
    try:
        rows, left_out = to_form(rows, wanted.form, seed=seed, revision_instruction=config.revision_instruction)
        rows = with_columns(rows, wanted.columns)
    except (FormError, ColumnError) as error:
        raise UsageError(str(error)) from error
    if before != wanted.form:
        say(f"{given} rows of {before} give {len(rows)} of {wanted.form}")
    kept = set(wanted.kept)
    return [replace(row, columns={k: v for k, v in row.columns.items() if k in kept}) for row in rows], left_out


def check_columns(slug: str, wanted: Wanted, have: Collection[str]) -> None:
    """Raise UsageError if columns are missing that only the data can give; says how to make them."""
    if missing := [name for name in wanted.columns if name not in have]:
        listed = "; ".join(f"`{name}`: {advice(name)}" for name in missing)
        raise UsageError(f"{slug} needs columns that the rows lack. {listed}")


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


def prepare(config: Any, wanted: Wanted, tokenizer: Any, out: Path, *, row_multiple: int) -> Prepared:
    """Examples, split and shapes of a training run."""
    seed = config.loop.seed
    examples = read_examples(config.data.data, tokenizer, config.data, out, wanted, seed=seed)
    if config.data.eval_data:
        held_out = read_examples(config.data.eval_data, tokenizer, config.data, None, wanted, seed=seed)
        train = examples
    elif config.data.held_out:
        train, held_out = split_examples(examples, held_out=config.data.held_out, seed=seed)
    else:
        train, held_out = examples, []
    if not train:
        raise ValueError(f"all {len(examples)} examples are held out; lower --held-out")
    size = config.loop.batch_size
    steps = config.loop.steps or max(1, round(config.loop.epochs * steps_per_epoch(len(train), size)))
    padded = config.data.layout == "padded"
    plan = layout_of(train, batch_size=size, row_multiple=row_multiple, seed=seed, padded=padded, steps=steps)
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
