"""The numbers of a row of images: who won, whether an image is liked, and the columns that losses read.

Names that data sets were published with, and what they are read as (`NAME_0`, `NAME_1` of the two images):

    ps_score, pickscore   score   PickScore of each image, a cosine: SmPO's data, and Pick-a-Pic scored anew
    ps_label              label   which image PickScore prefers; read where nobody else said who won

Number columns of other names keep them. A key whose name ends in a word for a quantity (label, score, reward, margin,
gap, weight, rating, tie) has to hold numbers; a text there would otherwise be lost without a word.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dpo_jax.rows import Reason, is_numeric, kind_of, numeric_column

PUBLISHED = {"ps_score": "score", "pickscore": "score", "ps_label": "label"}
# What Pick-a-Pic says of its rows besides; none of it is a number to learn from.
BOOKKEEPING = {"has_label", "are_different", "ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__"}
LABELS = ("label_0", "label_1", "label", "ps_label_0", "ps_label_1")
_OF_PAIRS = ("tie", "label_0", "label_1", "ps_label_0", "ps_label_1")
_QUANTITY = re.compile(r"(?:.*_)?(label|score|pickscore|reward|margin|gap|weight|rating|tie)s?(_[01])?")


def numbers_of(row: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """Numbers and lists of numbers under the keys of a row that are not used otherwise; NumPy's become Python's.

    Raises:
      Reason: a number that is not finite, or a quantity that is no number.
    """
    numbers: dict[str, Any] = {}
    for name, value in row.items():
        if name in used or name in BOOKKEEPING:
            continue
        if isinstance(value, (np.generic, np.ndarray)):
            value = value.tolist()
        if is_numeric(value):
            numbers[name] = numeric_column(name, value)
        elif _QUANTITY.fullmatch(name):
            raise Reason(f"{name} should be a number or a list of numbers, got {_shown(value)}")
    return numbers


def require_label(row: Mapping[str, Any]) -> None:
    """Refuse a row of which `has_label` says that nobody judged it.

    Raises:
      Reason: that, or a value that is neither true nor false.
    """
    known = row.get("has_label", True)
    if not isinstance(known, (bool, int, float, np.generic)) or known not in (0, 1):
        raise Reason(f"has_label should be true or false, got {_shown(known)}")
    if not known:
        raise Reason("has_label is false; expected a row with a label")


def first_wins(numbers: Mapping[str, Any]) -> float:
    """Whether the first image of a pair won: 1, 0 or, for a tie, 0.5.

    Raises:
      Reason: no label, one of another value, or two that do not agree.
    """
    names = [name for name in LABELS[:3] if name in numbers] or [name for name in LABELS[3:] if name in numbers]
    if not names:
        raise Reason("a pair without a label; expected label_0 (1, 0 or 0.5) or label (index of the winner)")
    for name in names:
        value = numbers[name]
        expected = "1, 0 or, for a tie, 0.5"
        if name == "label":
            expected = "the index of the winner, 0 or 1, or 0.5 for a tie"
        if (
            isinstance(value, (list, tuple))
            or value not in (0, 1, 0.5)
            or (name == "label" and isinstance(value, bool))
        ):
            raise Reason(f"{name} is {value!r}; expected {expected}")
    shares = [numbers[name] if name.endswith("_0") else 1 - numbers[name] for name in names]
    for name, share in zip(names, shares):
        if share != shares[0]:
            rule = "label is the index of the winner" if name == "label" else "expected a sum of 1"
            said = f"{names[0]} is {numbers[names[0]]!r} and {name} is {numbers[name]!r}"
            raise Reason(f"{said}, which do not agree; {rule}")
    return float(shares[0])


def columns_by_label(numbers: Mapping[str, Any], first: float) -> dict[str, Any]:
    """Columns of a pair whose first image won, lost or, at 0.5, did neither; `tie` says which.

    Raises:
      Reason: a number of one image alone, two numbers of one name, `tie` or `labels` that say otherwise.
    """
    _refuse(numbers, ["labels"], "of a pair; label_0 or label says who won")
    sides = ("rejected", "chosen") if first == 0 else ("chosen", "rejected")
    columns: dict[str, Any] = {"tie": int(first == 0.5)}
    came_from: dict[str, str] = {"tie": "the label"}
    for name, value in numbers.items():
        if name in LABELS:
            continue
        stem, end = name[:-2], name[-2:]
        given = name
        if end in ("_0", "_1"):
            other = stem + ("_1" if end == "_0" else "_0")
            if other in numbers:
                name = f"{sides[int(end[1])]}_{PUBLISHED.get(stem, stem)}"
            elif _QUANTITY.fullmatch(name):
                raise Reason(f"there is {name}, but no {other}; expected a number for each image")
        if name == "tie":
            if _zero_or_one(name, value) != columns[name]:
                raise Reason(f"tie is {value!r}, which is not what the label says; leave it out")
            continue
        if name in columns:
            raise Reason(f"{given} and {came_from[name]} are both {name}; leave one of them out")
        columns[name], came_from[name] = value, given
    return columns


def columns_in_order(numbers: Mapping[str, Any], images: str) -> dict[str, Any]:
    """Columns of a pair that is in order already, by the keys of its `images`.

    Raises:
      Reason: a label, or a number that does not say of which image it is; `tie` that is neither 0 nor 1.
    """
    _refuse(numbers, (*LABELS, "labels"), f"beside {images}, which say already who won")
    for name in numbers:
        if name.endswith(("_0", "_1")) and _QUANTITY.fullmatch(name):
            stem = PUBLISHED.get(name[:-2], name[:-2])
            raise Reason(f"there is {name} beside {images}; name it chosen_{stem} or rejected_{stem}")
    if "tie" in numbers:
        _zero_or_one("tie", numbers["tie"])
    return dict(numbers)


def columns_of_single(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of one image, whose `label` (or `labels`) says whether it is liked and becomes `labels`.

    Raises:
      Reason: labels that are neither true nor false, or two of them, or of a pair.
    """
    _refuse(numbers, _OF_PAIRS, "of a single image")
    given = [name for name in ("label", "labels") if name in numbers]
    if len(given) > 1:
        raise Reason("there is label beside labels; leave one of them out")
    for name in given:
        _zero_or_one(name, numbers[name])
    return {("labels" if name == "label" else name): value for name, value in numbers.items()}


def columns_of_list(numbers: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Columns of a list of `count` images, which has a score for each or none.

    Raises:
      Reason: scores that are not one number for each image, labels.
    """
    _refuse(numbers, (*_OF_PAIRS, "label", "labels"), "of a list; scores say how good its images are")
    scores = numbers.get("scores")
    if scores is not None and (not isinstance(scores, (list, tuple)) or len(scores) != count):
        given = len(scores) if isinstance(scores, (list, tuple)) else "no list of"
        raise Reason(f"{given} scores for {count} images; expected one number for each")
    if scores is not None and any(isinstance(score, (list, tuple)) for score in scores):
        raise Reason("scores holds lists; expected one number for each image")
    return dict(numbers)


def columns_of_patches(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a reference image and what was made of it.

    Raises:
      Reason: the label of a pair.
    """
    _refuse(numbers, _OF_PAIRS, "of entity and generated, which do not compete")
    return dict(numbers)


def _refuse(numbers: Mapping[str, Any], names: Collection[str], where: str) -> None:
    if found := next((name for name in names if name in numbers), None):
        raise Reason(f"there is {found} {where}; leave {found} out")


def _zero_or_one(name: str, value: Any) -> int:
    if isinstance(value, (list, tuple)) or value not in (0, 1):
        raise Reason(f"{name} is {value!r}; expected true or false (1 or 0)")
    return int(value)


def _shown(value: Any) -> str:
    """What a value is, and the value itself where that is short."""
    text = repr(value)
    return f"{kind_of(value)} {text}" if len(text) <= 40 else kind_of(value)
