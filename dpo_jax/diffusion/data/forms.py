"""Rows of one form as rows of another: what a method reads is made of what the files have."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dpo_jax.diffusion.data.parsing import ImageRow


class FormError(ValueError):
    """Rows that cannot take the form that is wanted; the message says why and what would help."""


def to_form(rows: Sequence[ImageRow], form: str, *, seed: int = 0) -> list[ImageRow]:
    """Rows of a form of `types.IMAGES`; rows of that form already are returned as they are.

    pairs        a list's best and worst by `scores` (which become `chosen_score` and `rejected_score`)
    singles      the images of a pair, liked and disliked; those of a list, liked if above the list's mean score
    mismatched   pairs of one image under two captions; or singles, each beside itself under the caption of another row
    experts      the chosen image of a pair, the best of a list, liked singles
    lists        a pair as a list of two

    Raises:
      FormError: rows of a form from which there is no way.
    """
    if not rows:
        return []
    if rows[0].form == form:
        return list(rows)
    if rows[0].frames > 1:
        raise FormError(f"the rows are pairs of videos, and {form} are made of images")
    makers = {
        ("lists", "pairs"): _pair_of_list,
        ("pairs", "singles"): _singles_of_pair,
        ("lists", "singles"): _singles_of_list,
        ("pairs", "experts"): lambda row: [_only(row, 0)],
        ("lists", "experts"): lambda row: [_only(row, int(np.argmax(_scores(row))))],
        ("singles", "experts"): lambda row: [_only(row, 0)] if row.columns.get("labels", 1) else [],
        ("pairs", "lists"): _list_of_pair,
    }
    if form == "mismatched" and all(len(set(row.captions)) == 2 and _one_image(row) for row in rows):
        return [replace(row, columns=_others(row, "tie") | {"labels": 1}, form="mismatched") for row in rows]
    if form == "mismatched":
        return _mismatched(to_form(rows, "singles"), seed)
    maker = makers.get((rows[0].form, form))
    if maker is None:
        ways = sorted({before for before, after in makers if after == form})
        raise FormError(f"the rows are {rows[0].form}, and {form} are made of {' or '.join(ways) or 'nothing else'}")
    made = [new for row in rows for new in maker(row)]
    if not made:
        raise FormError(f"none of the {len(rows)} rows of {rows[0].form} gives one of {form}")
    return made


def _scores(row: ImageRow) -> list[float]:
    if "scores" not in row.columns:
        raise FormError(f"row {row.number} of {row.file} is a list without `scores`; give a number for each image")
    return row.columns["scores"]


def _others(row: ImageRow, *gone: str) -> dict[str, Any]:
    """The columns that still mean something."""
    return {name: value for name, value in row.columns.items() if name not in gone and not name.startswith(_SIDES)}


_SIDES = ("chosen_", "rejected_")


def _captions(row: ImageRow, *places: int) -> tuple[str, ...]:
    return tuple(row.captions[place] for place in places) if row.captions else ()


def _one_image(row: ImageRow) -> bool:
    """Whether a pair is one image under two captions."""
    return row.form == "pairs" and row.images[0] == row.images[1]


def _only(row: ImageRow, place: int) -> ImageRow:
    """One image of a row, as an expert's."""
    caption = row.captions[place] if row.captions else row.caption
    columns = _others(row, "scores", "labels", "tie")
    return replace(row, caption=caption, images=(row.images[place],), columns=columns, form="experts", captions=())


def _pair_of_list(row: ImageRow) -> list[ImageRow]:
    scores = _scores(row)
    best, worst = int(np.argmax(scores)), int(np.argmin(scores))
    if scores[best] == scores[worst]:
        return []
    columns = _others(row, "scores") | {"chosen_score": scores[best], "rejected_score": scores[worst]}
    images = (row.images[best], row.images[worst])
    return [replace(row, images=images, columns=columns, form="pairs", captions=_captions(row, best, worst))]


def _singles_of_pair(row: ImageRow) -> list[ImageRow]:
    if row.columns.get("tie"):
        return []
    return [
        replace(_only(row, place), columns=_others(row, "tie") | {"labels": 1 - place}, form="singles")
        for place in (0, 1)
    ]


def _singles_of_list(row: ImageRow) -> list[ImageRow]:
    scores = _scores(row)
    mean = float(np.mean(scores))
    labelled = [(place, int(score > mean)) for place, score in enumerate(scores) if score != mean]
    return [
        replace(_only(row, place), columns=_others(row, "scores") | {"labels": label}, form="singles")
        for place, label in labelled
    ]


def _list_of_pair(row: ImageRow) -> list[ImageRow]:
    known = row.columns.get("chosen_score"), row.columns.get("rejected_score")
    scores = [1.0, 0.0] if None in known else [float(score) for score in known if score is not None]
    scores = [0.5, 0.5] if row.columns.get("tie") else scores
    return [replace(row, columns=_others(row, "tie") | {"scores": scores}, form="lists")]


def _mismatched(rows: Sequence[ImageRow], seed: int) -> list[ImageRow]:
    """Each single beside itself under the caption of the next row that has another one."""
    if len({row.caption for row in rows}) < 2:
        raise FormError("mismatched captions need rows of at least two captions")
    order = np.random.default_rng(seed).permutation(len(rows))
    made: list[ImageRow] = []
    for rank, place in enumerate(order):
        row = rows[place]
        others = (rows[order[(rank + step) % len(rows)]].caption for step in range(1, len(rows)))
        other = next(caption for caption in others if caption != row.caption)
        made.append(replace(row, images=row.images * 2, captions=(row.caption, other), form="mismatched"))
    inverse = np.argsort(order)
    return [made[place] for place in inverse]
