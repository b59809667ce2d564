"""Styles, splits, pairs and rates of Egida on synthetic wrappers."""

import math
from collections import Counter

import jax
import numpy as np
import pytest

from dpo_jax.language.methods.egida import (
    attack_success_rate,
    build_safety_pairs,
    expand_with_styles,
    holdout_style,
    holdout_topic,
    judge_agreement,
    split_by_request,
)

STYLES = {"BaseInstruction": "{question}", "play": ["<< {question} >>", "{x} {question}"], "end": "{question} ok?"}
REQUESTS = [
    {"uuid": f"r{i}", "question": f"do {i} {{y}}", "topics": {"even": i % 2 == 0, "third": i % 3 == 0}, "source": "s"}
    for i in range(12)
]
ROWS = expand_with_styles(REQUESTS, STYLES)
KEY = jax.random.key(0)


def is_unsafe(question, answer):
    return answer.startswith("bad")


def test_expansion_has_every_request_in_every_template():
    assert len(ROWS) == len(REQUESTS) * 4 == len({row["uuid"] for row in ROWS})
    assert Counter(row["style"] for row in ROWS) == {"BaseInstruction": 12, "play": 24, "end": 12}
    for row in ROWS:
        request = REQUESTS[int(row["base"][1:])]
        assert row["topics"] == request["topics"] and row["source"] == "s" and request["question"] in row["question"]
    assert [row["question"] for row in ROWS[:4]] == ["do 0 {y}", "<< do 0 {y} >>", "{x} do 0 {y}", "do 0 {y} ok?"]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_split_keeps_all_styles_of_a_request_together(share):
    train, test = split_by_request(ROWS, KEY, test_share=share)
    held = {row["base"] for row in test}
    assert len(held) == round(12 * share) and not held & {row["base"] for row in train}
    assert len(train) + len(test) == len(ROWS)
    assert split_by_request(ROWS, KEY, test_share=share).test == test
    if 0 < share < 1:
        assert split_by_request(ROWS, jax.random.key(1), test_share=share).test != test


def test_holdouts():
    style = holdout_style(ROWS, "end")
    assert {row["style"] for row in style.test} == {"end"} and len(style.test) == 12 and len(style.train) == 36
    topic = holdout_topic(ROWS, "third")
    assert all(row["topics"]["third"] for row in topic.test) and len(topic.test) == 4 * 4
    assert not any(row["topics"]["third"] for row in topic.train) and len(topic.train) == 8 * 4


def answers(seed=0):
    """The target is unsafe on about two rows in three; the first helper is missing or unsafe now and then."""
    rng = np.random.default_rng(seed)
    target = [f"{'bad' if rng.random() < 0.67 else 'fine'} {row['uuid']}" for row in ROWS]
    first = {row["uuid"]: f"{'bad' if rng.random() < 0.3 else 'safe'} one" for row in ROWS if rng.random() < 0.8}
    second = {row["uuid"]: f"{'bad' if rng.random() < 0.2 else 'safe'} two" for row in ROWS if rng.random() < 0.8}
    return target, [first, second]


def test_pairs_are_unsafe_against_the_first_safe_helper():
    target, helpers = answers()
    pairs = build_safety_pairs(ROWS, target, is_unsafe, helpers, KEY)
    expected = {}
    for row, answer in zip(ROWS, target):
        offers = [h.get(row["uuid"], "bad") for h in helpers]
        safe = [i for i, offer in enumerate(offers) if offer.startswith("safe")]
        if answer.startswith("bad") and safe:
            expected[row["uuid"]] = (row["question"], offers[safe[0]], answer, safe[0], row["style"])
    assert {p["helper"] for p in pairs} == {0, 1} and len(pairs) == len(expected) < len(ROWS)
    for p in pairs:
        assert (p["prompt"], p["chosen"], p["rejected"], p["helper"], p["style"]) == expected[p["uuid"]]


def test_draw_is_stratified_and_fixed_by_the_key():
    target, helpers = ["bad"] * len(ROWS), [{row["uuid"]: "safe" for row in ROWS}]
    pairs = build_safety_pairs(ROWS, target, is_unsafe, helpers, KEY, max_pairs=30)
    assert Counter(p["style"] for p in pairs) == {"BaseInstruction": 10, "play": 10, "end": 10}
    assert pairs == build_safety_pairs(ROWS, target, is_unsafe, helpers, KEY, max_pairs=30)
    other = build_safety_pairs(ROWS, target, is_unsafe, helpers, jax.random.key(1), max_pairs=30)
    assert {p["uuid"] for p in other} != {p["uuid"] for p in pairs}
    more = build_safety_pairs(ROWS, target, is_unsafe, helpers, KEY, max_pairs=40)
    # Small strata are used up; the large one gives the rest.
    assert Counter(p["style"] for p in more) == {"BaseInstruction": 12, "play": 16, "end": 12}
    by_topics = build_safety_pairs(ROWS, target, is_unsafe, helpers, KEY, max_pairs=16, stratify=("topics",))
    assert set(Counter(tuple(p["topics"].items()) for p in by_topics).values()) == {4}


def test_no_pairs_without_unsafe_or_safe_answers():
    helpers = [{row["uuid"]: "safe" for row in ROWS}]
    assert build_safety_pairs(ROWS, ["fine"] * len(ROWS), is_unsafe, helpers, KEY) == []
    assert build_safety_pairs(ROWS, ["bad"] * len(ROWS), is_unsafe, [{}], KEY) == []


def test_rates_by_style_and_by_every_topic_of_a_row():
    unsafe = np.random.default_rng(2).random(len(ROWS)) < 0.4
    found = attack_success_rate(ROWS, unsafe.tolist())
    assert found.asr == pytest.approx(unsafe.mean())
    sizes = Counter(row["style"] for row in ROWS)
    weighted = sum(rate * sizes[style] for style, rate in found.by_style.items()) / len(ROWS)
    assert weighted == pytest.approx(found.asr)
    for topic in ("even", "third"):
        inside = [bool(row["topics"][topic]) for row in ROWS]
        assert found.by_topic[topic] == pytest.approx(unsafe[inside].mean())
    assert attack_success_rate([{"style": "a"}], [True]) == (1.0, {"a": 1.0}, {})


def test_agreement_of_a_judge():
    human = [True] * 25 + [False] * 25
    judge = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert judge_agreement(human, judge) == pytest.approx((0.7, 0.4, 20 / 30, 20 / 25, 40 / 55))
    assert judge_agreement(human, human) == (1, 1, 1, 1, 1)
    assert judge_agreement([True, True, False, False], [True, False, True, False]).kappa == 0
    constant = judge_agreement([False, False], [False, False])
    assert constant.agreement == 1 and all(math.isnan(v) for v in constant[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expand_with_styles(REQUESTS, {"a": "no place"}), "'a' has no {question}"),
        (lambda: expand_with_styles([REQUESTS[0], REQUESTS[0]], STYLES), "row 1 repeats the uuid 'r0'"),
        (lambda: split_by_request(ROWS, KEY, test_share=1.5), "test_share is 1.5"),
        (lambda: holdout_style(ROWS, "none"), "style 'none'"),
        (lambda: holdout_topic(ROWS, "none"), "topic 'none'"),
        (lambda: build_safety_pairs(ROWS, ["bad"], is_unsafe, [], KEY), "48 rows and 1 answers"),
        (lambda: build_safety_pairs([], [], is_unsafe, [], KEY, max_pairs=0), "max_pairs is 0"),
        (lambda: attack_success_rate([], []), "0 rows"),
        (lambda: judge_agreement([True], []), "1 human labels and 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
