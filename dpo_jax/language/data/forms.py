"""Rows of one form turned into another: a list into its best and worst answer, a pair into two labelled singles."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.language.data.rows import Form, Message, PreferenceRow, SkippedRow
from dpo_jax.language.methods.kto import mismatched_indices
from dpo_jax.language.types import COMPLETIONS

REVISION = "Improve the answer above."


class Converted(NamedTuple):
    """Rows of the form that was asked for, and those that could not be turned into it."""

    rows: list[PreferenceRow]
    left_out: list[SkippedRow]


class FormError(ValueError):
    """Rows of this form cannot become rows of that one."""


def to_form(
    rows: Sequence[PreferenceRow], form: Form, *, seed: int = 0, revision_instruction: str = REVISION
) -> Converted:
    """The rows in another form.

    - pairs: of a list the best and the worst item (by `scores`, or else the first and the last), of a triple chosen and
      rejected.
    - triples: of a list the best item, the second and the worst.
    - singles: of a pair two rows, with the column `labels` 1 and 0; of a list those of its pair.
    - mismatched: singles, each with the completion of another row, under another prompt, beside its own.
    - revisions: of a pair both answers to the prompt, and both as improvements of either.
    - lists: of a pair or triple its completions with `scores` that fall from 1 to 0, unless it has some.

    Args:
      rows: of one form.
      form: the one that is wanted.
      seed: of the choice of mismatched completions.
      revision_instruction: what asks for an improvement of an answer.

    Returns:
      The rows in their order, and the rows that have no such form (a list whose scores are all equal, of one item).

    Raises:
      FormError: no row of this form can become one of that form, and what rows would do.
    """
    if not rows or (rows[0].form == form and form != "lists"):
        return Converted(list(rows), [])
    source = rows[0].form
    if form == "mismatched":
        singles = to_form(rows, "singles", seed=seed)
        return Converted(_with_mismatched(singles.rows, seed), singles.left_out)
    if form in ("singles", "revisions") and source in ("lists", "triples"):
        pairs = to_form(rows, "pairs")
        done = to_form(pairs.rows, form, seed=seed, revision_instruction=revision_instruction)
        return Converted(done.rows, [*pairs.left_out, *done.left_out])
    if (source, form) == ("pairs", "revisions"):
        return Converted([_revisions(row, revision_instruction) for row in rows], [])
    if (source, form) not in _CONVERSIONS:
        raise FormError(f"the rows are {source}, and {form} are needed: {_NEEDED[form]}")
    convert, result, left_out = _CONVERSIONS[source, form], list[PreferenceRow](), list[SkippedRow]()
    for row in rows:
        made = convert(row)
        if isinstance(made, str):
            left_out.append(SkippedRow(row.file, row.number, made))
        else:
            result += made
    return Converted(result, left_out)


_NEEDED = {
    "pairs": "each row with the keys prompt, chosen and rejected, or a list with scores",
    "triples": "each row with the keys prompt, gold, chosen and rejected, or a list of at least three with scores",
    "singles": "each row with the keys prompt, completion and label, or pairs",
    "mismatched": "each row with the keys prompt, completion and label, or pairs",
    "revisions": "each row with the keys prompt, chosen and rejected",
    "lists": "each row with the keys prompt, completions and scores",
}


def _ranking(row: PreferenceRow) -> list[int]:
    """Items of a list from the best to the worst."""
    scores = row.columns.get("scores")
    if scores is None:
        return list(range(len(row.completions)))
    return sorted(range(len(row.completions)), key=lambda i: -scores[i])


def _pick(row: PreferenceRow, form: Form, items: Sequence[int]) -> PreferenceRow:
    """A row of some items of a list; scores of chosen and rejected become columns of their own."""
    scores = row.columns.get("scores")
    columns = {k: v for k, v in row.columns.items() if not _is_per_item(v, len(row.completions))}
    if scores is not None:
        named = zip(COMPLETIONS[form], items)
        columns |= {f"{name}_score": scores[i] for name, i in named if name in ("chosen", "rejected")}
        columns["list_scores"] = list(scores)
    return replace(row, form=form, completions=tuple(row.completions[i] for i in items), columns=columns)


def _is_per_item(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


def _list_to_pair(row: PreferenceRow) -> list[PreferenceRow] | str:
    order = _ranking(row)
    scores = row.columns.get("scores", order[::-1])
    if len(order) < 2:
        return "a list of one item has no pair"
    if scores[order[0]] == scores[order[-1]]:
        return "all scores of the list are equal, so no item is preferred"
    return [_pick(row, "pairs", (order[0], order[-1]))]


def _list_to_triple(row: PreferenceRow) -> list[PreferenceRow] | str:
    order = _ranking(row)
    if len(order) < 3:
        return f"a list of {len(order)} items has no triple"
    return [_pick(row, "triples", (order[1], order[-1], order[0]))]  # chosen, rejected, gold


def _triple_to_pair(row: PreferenceRow) -> list[PreferenceRow]:
    return [replace(row, form="pairs", completions=row.completions[:2])]


def _pair_to_singles(row: PreferenceRow) -> list[PreferenceRow]:
    columns = {k: v for k, v in row.columns.items() if not {"chosen", "rejected"} & set(k.split("_"))}
    columns = {k: v for k, v in columns.items() if not _is_per_item(v, 2)}
    sides = zip(row.completions, (1, 0))
    return [
        replace(row, form="singles", completions=(text,), columns={**columns, "labels": label}) for text, label in sides
    ]


def _with_default_scores(row: PreferenceRow) -> list[PreferenceRow]:
    """The row as a list, best first; without scores they fall evenly from 1 to 0."""
    if row.form == "triples":
        row = replace(row, completions=(row.completions[2], *row.completions[:2]))
    columns, count = dict(row.columns), len(row.completions)
    if row.form == "pairs" and {"chosen_score", "rejected_score"} <= columns.keys():
        columns["scores"] = [columns["chosen_score"], columns["rejected_score"]]
    if row.form != "singles":
        columns.setdefault("scores", [1.0 - i / max(count - 1, 1) for i in range(count)])
    return [replace(row, form="lists", columns=columns)]


_CONVERSIONS: dict[tuple[str, str], Callable[[PreferenceRow], list[PreferenceRow] | str]] = {
    ("lists", "pairs"): _list_to_pair,
    ("lists", "triples"): _list_to_triple,
    ("triples", "pairs"): _triple_to_pair,
    ("pairs", "singles"): _pair_to_singles,
    ("lists", "lists"): _with_default_scores,
    ("pairs", "lists"): _with_default_scores,
    ("triples", "lists"): _with_default_scores,
    ("singles", "lists"): _with_default_scores,
}


def _with_mismatched(rows: Sequence[PreferenceRow], seed: int) -> list[PreferenceRow]:
    """Beside each completion that of another row: the next one, in a random cyclic order, with another prompt.

    Fixed for the run, so that the reference's log-probs of the mismatched completions are columns like all others.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    try:
        following = mismatched_indices([rows[index].prompt for index in order])
    except ValueError as error:
        raise FormError(str(error)) from error
    lent = dict(zip(order, (rows[order[place]].completions[0] for place in following)))
    return [replace(row, form="mismatched", completions=(row.completions[0], lent[i])) for i, row in enumerate(rows)]


def _revisions(row: PreferenceRow, instruction: str) -> PreferenceRow:
    """Chosen and rejected after the prompt, after the chosen answer and after the rejected answer."""
    chosen, rejected = row.completions

    def after(answer: str) -> tuple[Message, ...]:
        return {"role": "assistant", "content": answer}, {"role": "user", "content": instruction}

    contexts = ((), (), after(chosen), after(chosen), after(rejected), after(rejected))
    return replace(row, form="revisions", completions=(chosen, rejected) * 3, contexts=contexts)
