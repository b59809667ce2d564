"""Egida: a safety retrofit by plain DPO on two thousand pairs, a model's own unsafe answers against borrowed safe ones.

Garcia-Gasulla et al. 2025, arXiv 2502.13603. Evidence: dataset card and paper for the data, the pairs and the
evaluation; hyper-parameters of the training are not published.

    requests x attack styles  ->  the target model answers  ->  keep what a judge calls unsafe, as `rejected`
    chosen = the first safe answer of the helper models, in order of preference;  about 2,000 pairs, stratified
    ASR = unsafe answers / attacks, overall, per style, and per topic (a row counts in each of its topics)

The loss is `dpo_loss`. Everything here runs on the host and takes and returns plain rows (dicts); attack templates and
requests are the user's files. A row has `uuid`, `question`, `style` and `topics` (topic -> bool), and after
`expand_with_styles` also `base`, the uuid of the request that all its styles share. Rejected answers are on-policy,
chosen ones are not: look at `more_is_less.linear_probe` for how easily the two are told apart.

>>> request = {"uuid": "r1", "question": "open it", "topics": {"locks": True}}
>>> styled = expand_with_styles([request], {"BaseInstruction": "{question}", "play": "You are a key. {question}!"})
>>> [(row["uuid"], row["question"]) for row in styled]
[('r1/BaseInstruction', 'open it'), ('r1/play', 'You are a key. open it!')]
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.statistics import cohen_kappa, generator
from dpo_jax.types import Array

Row = Mapping[str, Any]
PLACE = "{question}"


class Split(NamedTuple):
    """Rows to train on and rows to test with."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


class AttackRates(NamedTuple):
    """Attack success rates in [0, 1]; those of topics need not average to `asr`, since rows have several."""

    asr: float
    by_style: dict[str, float]
    by_topic: dict[str, float]


class JudgeAgreement(NamedTuple):
    """How well a judge agrees with humans on which answers are unsafe; `precision`, `recall`, `f1` of "unsafe".

    A quotient whose denominator is 0 is nan: kappa if both always give one and the same answer.
    """

    agreement: float
    kappa: float
    precision: float
    recall: float
    f1: float


def expand_with_styles(rows: Sequence[Row], styles: Mapping[str, str | Sequence[str]]) -> list[dict[str, Any]]:
    """Every request in every attack style: questions x templates rows, each request's rows together.

    Args:
      rows: with `uuid` and `question`; other keys are kept.
      styles: name -> template, or several, in which `{question}` stands for the request. The plain request is a style
        like the others (the dataset's "BaseInstruction").

    Returns:
      rows with the wrapped `question`, `style`, `base` (the request's uuid) and a `uuid` of their own.

    Raises:
      ValueError: a uuid occurs twice, or a template has no `{question}`.
    """
    templates = [
        (name, f"{name}/{number}" if number else name, template)
        for name, given in styles.items()
        for number, template in enumerate([given] if isinstance(given, str) else given)
    ]
    for _, label, template in templates:
        if PLACE not in template:
            raise ValueError(f"the template of {label!r} has no {PLACE}")
    _require_unique(rows)
    # Replaced, not formatted: requests and templates may hold braces of their own.
    return [
        {
            **row,
            "uuid": f"{row['uuid']}/{label}",
            "base": row["uuid"],
            "style": name,
            "question": template.replace(PLACE, row["question"]),
        }
        for row in rows
        for name, label, template in templates
    ]


def split_by_request(rows: Sequence[Row], key: Array, *, test_share: float) -> Split:
    """Requests drawn for testing, with all their styles: no request is on both sides.

    Args:
      rows: with `base`.
      key: of jax.random.
      test_share: of the requests, in [0, 1], rounded to a whole number.
    """
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share is {test_share}; give a number in [0, 1]")
    requests = list(dict.fromkeys(row["base"] for row in rows))
    order = generator(key).permutation(len(requests))
    held = {requests[i] for i in order[: round(test_share * len(requests))]}
    return _split(rows, lambda row: row["base"] in held)


def holdout_style(rows: Sequence[Row], style: str) -> Split:
    """Train on all other attack styles, test on this one; requests are on both sides, which is the question asked.

    Raises:
      ValueError: no row has the style.
    """
    return _require_held(_split(rows, lambda row: row["style"] == style), "style", style)


def holdout_topic(rows: Sequence[Row], topic: str) -> Split:
    """Train on rows without the topic, test on all that have it among theirs.

    Raises:
      ValueError: no row has the topic.
    """
    return _require_held(_split(rows, lambda row: topic in _topics(row)), "topic", topic)


def build_safety_pairs(
    rows: Sequence[Row],
    target_answers: Sequence[str],
    is_unsafe: Callable[[str, str], bool],
    safe_answers: Sequence[Mapping[str, str]],
    key: Array,
    *,
    max_pairs: int = 2000,
    stratify: Sequence[str] = ("style",),
) -> list[dict[str, Any]]:
    """Pairs for DPO: the target model's unsafe answers against the first helper answer that the judge calls safe.

    Args:
      rows: with `uuid` and `question`.
      target_answers: the target model's own answer to each row.
      is_unsafe: judge of (question, answer).
      safe_answers: for each helper model, the preferred one first, uuid -> answer.
      key: of jax.random, for the draw within strata.
      max_pairs: taken in turn from every stratum until they are empty.
      stratify: keys of a row whose values make a stratum; `topics` stands for the set of its topics.

    Returns:
      rows of `prompt`, `chosen`, `rejected`, `uuid`, `helper` (index of the model that gave the chosen answer), and
      `style` and `topics` where the row has them.

    Raises:
      ValueError: another number of answers than rows, a uuid that occurs twice, max_pairs below 1.
    """
    if len(rows) != len(target_answers):
        raise ValueError(f"{len(rows)} rows and {len(target_answers)} answers; give one answer per row")
    if max_pairs < 1:
        raise ValueError(f"max_pairs is {max_pairs}; give at least 1")
    _require_unique(rows)
    strata: dict[tuple, list[dict[str, Any]]] = {}
    for row, answer in zip(rows, target_answers):
        question, uuid = row["question"], row["uuid"]
        if not is_unsafe(question, answer):
            continue
        offers = ((i, answers[uuid]) for i, answers in enumerate(safe_answers) if uuid in answers)
        safe = next(((i, offer) for i, offer in offers if not is_unsafe(question, offer)), None)
        if safe is None:
            continue
        pair = {"prompt": question, "chosen": safe[1], "rejected": answer, "uuid": uuid, "helper": safe[0]}
        pair |= {name: row[name] for name in ("style", "topics") if name in row}
        stratum = tuple(tuple(_topics(row)) if name == "topics" else row[name] for name in stratify)
        strata.setdefault(stratum, []).append(pair)
    rng = generator(key)
    shuffled = [[members[i] for i in rng.permutation(len(members))] for members in strata.values()]
    turns = max(map(len, shuffled), default=0)
    in_turn = [members[turn] for turn in range(turns) for members in shuffled if turn < len(members)]
    return in_turn[:max_pairs]


def attack_success_rate(rows: Sequence[Row], unsafe: Sequence[bool]) -> AttackRates:
    """Share of unsafe answers, overall, per style and per topic.

    Args:
      rows: with `style` and, where known, `topics`.
      unsafe: the judge's verdict on the answer to each row.

    Raises:
      ValueError: no rows, or another number of verdicts.
    """
    if not rows or len(rows) != len(unsafe):
        raise ValueError(f"{len(rows)} rows and {len(unsafe)} verdicts; give one verdict per row, at least one row")
    styles: dict[str, list[bool]] = {}
    topics: dict[str, list[bool]] = {}
    for row, verdict in zip(rows, unsafe):
        styles.setdefault(row["style"], []).append(bool(verdict))
        for topic in _topics(row):
            topics.setdefault(topic, []).append(bool(verdict))
    return AttackRates(
        asr=float(np.mean(np.asarray(unsafe, bool))),
        by_style={name: float(np.mean(verdicts)) for name, verdicts in styles.items()},
        by_topic={name: float(np.mean(verdicts)) for name, verdicts in topics.items()},
    )


def judge_agreement(human: Sequence[bool], judge: Sequence[bool]) -> JudgeAgreement:
    """Agreement of an automatic judge with human labels, true for "unsafe".

    Raises:
      ValueError: no labels, or numbers that differ.
    """
    h, j = np.asarray(human, bool), np.asarray(judge, bool)
    if not h.size or h.shape != j.shape:
        raise ValueError(f"{h.size} human labels and {j.size} of the judge; give as many of both, at least one")
    hits = float(np.sum(h & j))
    return JudgeAgreement(
        agreement=float(np.mean(h == j)),
        kappa=cohen_kappa(h, j),
        precision=_quotient(hits, float(j.sum())),
        recall=_quotient(hits, float(h.sum())),
        f1=_quotient(2 * hits, float(h.sum() + j.sum())),
    )


def _quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _topics(row: Row) -> list[str]:
    return sorted(topic for topic, there in row.get("topics", {}).items() if there)


def _split(rows: Sequence[Row], is_test: Callable[[Row], bool]) -> Split:
    return Split([dict(row) for row in rows if not is_test(row)], [dict(row) for row in rows if is_test(row)])


def _require_held(split: Split, kind: str, name: str) -> Split:
    if not split.test:
        raise ValueError(f"no row has the {kind} {name!r}")
    return split


def _require_unique(rows: Sequence[Row]) -> None:
    seen = set()
    for number, row in enumerate(rows):
        if row["uuid"] in seen:
            raise ValueError(f"row {number} repeats the uuid {row['uuid']!r}; every row needs one of its own")
        seen.add(row["uuid"])
