"""Columns made from what rows already hold: margins from scores, soft labels, calibrations from a text classifier.

What a frozen model says of a row is made by `annotate`; this file needs no model.
"""

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dpo_jax.language.data.rows import PreferenceRow
from dpo_jax.statistics import logistic_regression

FEATURES = 256  # hashed words of a text
FOLDS = 5  # a row's own label never enters its own estimate


class ColumnError(ValueError):
    """Rows lack what a column is made from; says how to give or make it."""


class Recipe(NamedTuple):
    """How a column is made.

    Attributes:
      needs: columns that it is computed from.
      make: their values of one row -> the value; None if it takes a model or all rows at once.
      advice: how a user gets the column.
    """

    needs: tuple[str, ...]
    make: Callable[..., Any] | None
    advice: str


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def win_probability(index: int, scores: Sequence[float]) -> float:
    """Mean over all items, itself included, of the Bradley-Terry probability that an item beats them.

    Wu et al. 2024 (SPPO), arXiv 2405.00675.
    """
    return sum(_sigmoid(scores[index] - other) for other in scores) / len(scores)


_SCORES = "give each row `chosen_score` and `rejected_score`, or a list with scores, or --reward-model"

RECIPES: dict[str, Recipe] = {
    "labels": Recipe((), None, "give each row `label`, true or false, or give pairs"),
    "scores": Recipe((), None, "give each list `scores`, or items with a `score`, or --reward-model"),
    "chosen_score": Recipe((), None, _SCORES),
    "rejected_score": Recipe((), None, _SCORES),
    "margin": Recipe(("chosen_score", "rejected_score"), lambda w, l: w - l, f"give each row `margin`, or {_SCORES}"),
    "label_prob": Recipe(
        ("chosen_score", "rejected_score"),
        lambda w, l: _sigmoid(w - l),
        f"give each row `label_prob`, the share of raters that prefer chosen, or {_SCORES}",
    ),
    "is_tie": Recipe(
        ("chosen_score", "rejected_score"),
        lambda w, l: int(w == l),
        f"give each row `is_tie`: 1 where the raters saw no difference, else 0, or {_SCORES}",
    ),
    "chosen_win_prob": Recipe(
        ("list_scores",),
        lambda scores: win_probability(int(np.argmax(scores)), scores),
        "give each row `chosen_win_prob`, or a list with scores",
    ),
    "rejected_win_prob": Recipe(
        ("list_scores",),
        lambda scores: win_probability(int(np.argmin(scores)), scores),
        "give each row `rejected_win_prob`, or a list with scores",
    ),
    "list_scores": Recipe(("chosen_score", "rejected_score"), lambda w, l: [w, l], _SCORES),
    "target_probs": Recipe(("scores",), _softmax, "give each list `target_probs`, or `scores`, whose softmax they are"),
    "is_adversarial": Recipe(
        (), None, "give each row `is_adversarial`: 1 where a list is a gold answer and samples of the policy, else 0"
    ),
    "calibration": Recipe(
        ("golden",), None, "give each row `calibration`, or `golden`: 1 where it comes from the trusted source, else 0"
    ),
    "prob_desirable": Recipe(("labels",), None, "give each row `prob_desirable` or `label`"),
    "step_ids": Recipe((), None, "give --step-delimiter, the text that ends a step, or a list of integers per token"),
    "guidance_logps": Recipe((), None, "give --guidance-model, a checkpoint whose tokenizer is the policy's"),
    "contrastive_logps": Recipe((), None, "give --positive-model and --negative-model, fine-tuned from one start"),
    "semantic_distance": Recipe((), None, "give each row `semantic_distance`, or --embedding-model"),
    "step_similarity": Recipe((), None, "give --embedding-model and --step-delimiter"),
}


def advice(name: str) -> str:
    """How a user gets a column."""
    return RECIPES[name].advice if name in RECIPES else f"give each row a number or a list of numbers `{name}`"


def with_columns(rows: Sequence[PreferenceRow], wanted: Collection[str]) -> list[PreferenceRow]:
    """The rows with those of the wanted columns that can be made from what they hold.

    Args:
      rows: of one form, all with the same columns.
      wanted: names; those that a model has to make, or that nothing here can make, are passed over.

    Raises:
      ColumnError: values of another kind than the recipe reads.
    """
    rows = list(rows)
    for name in wanted:
        if rows and name not in rows[0].columns:
            rows = _with_column(rows, name)
    return rows


def _with_column(rows: list[PreferenceRow], name: str) -> list[PreferenceRow]:
    recipe = RECIPES.get(name)
    if recipe is not None and name in _OF_ALL_ROWS and all(n in rows[0].columns for n in recipe.needs):
        values = _OF_ALL_ROWS[name](rows)
    else:
        values = [value_of(name, row.columns) for row in rows]
    if any(value is None for value in values):
        return rows
    return [replace(row, columns={**row.columns, name: value}) for row, value in zip(rows, values)]


def value_of(name: str, columns: Mapping[str, Any]) -> Any:
    """A column's value from the others of its row, or None if no recipe leads there.

    Raises:
      ColumnError: values of another kind than the recipe reads.
    """
    recipe = RECIPES.get(name)
    if name in columns or recipe is None or recipe.make is None:
        return columns.get(name)
    needed = [value_of(other, columns) for other in recipe.needs]
    if any(value is None for value in needed):
        return None
    try:
        return recipe.make(*needed)
    except TypeError as error:
        raise ColumnError(f"column {name!r} cannot be made of {', '.join(recipe.needs)} ({error})") from error


def sources_of(name: str) -> set[str]:
    """A column and all that recipes make it of."""
    recipe = RECIPES.get(name)
    return {name}.union(*(sources_of(other) for other in recipe.needs)) if recipe else {name}


def text_features(text: str) -> np.ndarray:
    """Counts of a text's words, hashed to a unit vector float64 [FEATURES]; the same on every machine."""
    counts = np.zeros(FEATURES)
    for word in text.lower().split():
        counts[zlib.crc32(word.encode("utf-8", "replace")) % FEATURES] += 1
    norm = np.linalg.norm(counts)
    return counts / norm if norm else counts


def cross_fitted_logits(features: np.ndarray, labels: np.ndarray, *, l2: float = 1e-2) -> np.ndarray:
    """Logit that each row is a positive one, by logistic regressions on the other rows; both classes weigh alike.

    Args:
      features: float64 [N, D].
      labels: [N] of 0 and 1.
      l2: of the weights, for one row of weight 1.

    Returns:
      float64 [N]; zero if one class is missing.
    """
    count, labels = len(labels), np.asarray(labels, np.float64)
    logits, folds = np.zeros(count), np.arange(count) % FOLDS
    inputs = np.concatenate([features, np.ones((count, 1))], 1)
    for fold in range(FOLDS):
        inside, outside = folds != fold, folds == fold
        positive = labels[inside].sum()
        negative = inside.sum() - positive
        if min(positive, negative) == 0 or not outside.any():
            continue
        share = np.where(labels[inside] > 0, 0.5 / positive, 0.5 / negative)
        coefficients = logistic_regression(inputs[inside], labels[inside], weights=share, penalty=l2 / count)
        logits[outside] = np.clip(inputs[outside] @ coefficients, -30, 30)
    return logits


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def _prob_desirable(rows: Sequence[PreferenceRow]) -> list[float]:
    """P(desirable) of each prompt (underlying-distribution matching of BCO, arXiv 2404.04656)."""
    features = np.stack([text_features(_text(row.prompt)) for row in rows])
    labels = np.array([float(row.columns["labels"]) for row in rows])
    return [_sigmoid(logit) for logit in cross_fitted_logits(features, labels)]


def _calibration(rows: Sequence[PreferenceRow]) -> list[float]:
    """How much each pair looks like the trusted source, mean 1 (arXiv 2504.05831): golden against all other rows."""
    from dpo_jax.language.methods.robust_shift import golden_calibration

    golden = np.array([float(row.columns["golden"]) for row in rows])
    if not 0 < golden.sum() < len(rows):
        raise ColumnError("every row has the same `golden`; calibration needs rows of both kinds")
    imbalance = (len(rows) - golden.sum()) / golden.sum()
    values = np.zeros(len(rows))
    sides = len(rows[0].completions)
    for side in range(sides):
        features = np.stack([text_features(f"{_text(row.prompt)} {row.completions[side]}") for row in rows])
        logits = cross_fitted_logits(features, golden)
        found = golden_calibration(
            jnp.asarray(logits[:, None], jnp.float32),
            imbalance=jnp.array([imbalance]),
            mixture=jnp.array([golden.mean()]),
        )
        values += np.asarray(found)
    values /= sides
    return [float(v) for v in values / max(values.mean(), 1e-12)]


_OF_ALL_ROWS: dict[str, Callable[[Sequence[PreferenceRow]], list[float]]] = {
    "prob_desirable": _prob_desirable,
    "calibration": _calibration,
}
