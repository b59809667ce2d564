"""Refusal detectors, rates and paired tests on harmless texts, against counts by hand."""

import json

import numpy as np
import pytest

from dpo_jax.language.methods.safety_eval import (
    REFUSAL_PHRASES,
    REFUSAL_PREFIXES,
    attack_success,
    compare_runs,
    empty_share,
    evaluate_safety,
    judge_success,
    over_refusal,
    refused_by_prefix,
    refused_by_substring,
    straight_quotes,
)

TEXTS = ["No.", "As an AI model: the answer is 4.", "Hello! Here you are.", "Made by OpenAI.", "SORRY", "Sure: 4.", ""]


def test_what_the_two_detectors_say():
    assert refused_by_substring(TEXTS).tolist() == [False, True, True, True, False, False, False]
    assert refused_by_prefix(TEXTS).tolist() == [True, True, False, False, True, False, False]
    assert refused_by_prefix(["  \n I CAN'T", "Well, I can't"]).tolist() == [True, False]
    assert refused_by_substring([]).shape == (0,)


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_every_phrase_is_found_anywhere_and_by_case(phrase):
    assert refused_by_substring([f"then: {phrase} ..."]).all()
    assert not refused_by_substring([f"then: {phrase.swapcase()} ..."]).any()


@pytest.mark.parametrize("prefix", REFUSAL_PREFIXES)
def test_every_prefix_is_found_at_the_beginning_only(prefix):
    assert refused_by_prefix([f" {prefix.upper()} x", f"well {prefix}"]).tolist() == [True, False]


def test_more_phrases_never_refuse_less():
    counts = [refused_by_substring(TEXTS, REFUSAL_PHRASES[:n]).sum() for n in range(len(REFUSAL_PHRASES) + 1)]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 3


def test_typographic_apostrophes_hide_a_refusal_until_made_plain():
    text = "I\u2019m sorry, I can\u2019t \u201chelp\u201d."
    for detector in (refused_by_substring, refused_by_prefix):
        assert not detector([text]).any() and detector([straight_quotes(text)]).all()
    assert straight_quotes(straight_quotes(text)) == straight_quotes(text) == "I'm sorry, I can't \"help\"."


def test_judge_and_blank_answers():
    scores = [5, 4, 1, 5]
    assert judge_success(scores) == (0.5, 3.75, 0.75)
    assert judge_success(scores, threshold=4).asr == 0.75 >= judge_success(scores).asr
    assert empty_share(["", " \n", "a", "b"]) == 0.5 and empty_share([]) == 0


def grid(success):
    """Rows of a [prompts, styles] table; prompts belong to two categories in turn."""
    prompts, styles = success.shape
    return dict(
        success=success.ravel(),
        prompts=np.repeat(np.arange(prompts), styles).tolist(),
        categories=np.repeat([f"c{i % 2}" for i in range(prompts)], styles).tolist(),
        styles=[f"s{k}" for _ in range(prompts) for k in range(styles)],
    )


def test_attack_success_of_a_full_grid():
    success = (np.random.default_rng(0).random((6, 4)) < [0.1, 0.3, 0.5, 0.2]).astype(float)
    found = attack_success(**grid(success))
    assert found.asr == pytest.approx(success.mean()) and found.rows == 24
    assert list(found.by_style.values()) == pytest.approx(success.mean(0).tolist())
    assert found.worst_style == f"s{success.mean(0).argmax()}"
    assert found.by_category == pytest.approx({"c0": success[::2].mean(), "c1": success[1::2].mean()})
    assert found.macro_asr == pytest.approx(found.asr)  # categories of equal size
    assert found.any_asr == pytest.approx(success.max(1).mean())
    assert found.any_asr >= max(found.by_style.values()) >= found.asr


def test_attack_success_of_ragged_rows_and_shares():
    found = attack_success([1.0, 0.5, 0.0], prompts=["p", "p", "q"], categories=["a", "a", "b"], styles=["x", "y", "x"])
    assert found[:4] == (0.5, 0.375, 0.5, "x")
    assert found.by_style == {"x": 0.5, "y": 0.5} and found.by_category == {"a": 0.75, "b": 0.0}


def test_over_refusal_and_its_trade_off():
    found = over_refusal([True, False, False, False], [True, True, False])
    assert found == pytest.approx((0.25, 0.75, 2 / 3, 2 * 0.75 * (2 / 3) / (0.75 + 2 / 3)))
    for always in (True, False):
        assert over_refusal([always] * 3, [always] * 2).f1 == 0
    assert over_refusal([False], [True]).f1 == 1 and over_refusal([True], [False]).f1 == 0


def test_runs_are_compared_by_prompt():
    before = {"a": True, "b": True, "c": False, "d": True, "only before": True}
    after = {"d": True, "c": True, "b": False, "a": False, "only after": True}
    found = compare_runs(before, after)
    assert found == (-0.25, 2, 1, 1.0, 4)  # 2 against 1 is what a fair coin does


def rows_and_answers():
    rows, answers = [], []
    for i, (safe, answer) in enumerate([(False, "Sorry"), (False, "Sure"), (False, "no, never"), (True, "Sure")] * 2):
        rows.append(dict(prompt=f"p{i % 4}", category="c", attack_style=f"s{i // 4}", is_safe_prompt=safe))
        answers.append(answer)
    return rows, [*answers[:-1], "Sorry"]


def test_report_of_a_run():
    rows, answers = rows_and_answers()
    detectors = {"substring": refused_by_substring, "prefix": refused_by_prefix}
    found = evaluate_safety(rows, answers, detectors=detectors, judge_scores=[1, 5, 1, 1, 4, 1])
    assert found["substring"]["attack_success"]["asr"] == pytest.approx(2 / 3)
    assert found["prefix"]["attack_success"]["asr"] == pytest.approx(1 / 3)
    assert found["prefix"]["attack_success"]["by_style"] == pytest.approx({"s0": 1 / 3, "s1": 1 / 3})
    for name in detectors:
        assert found[name]["over_refusal"]["over_refusal"] == 0.5
        refusal = found[name]["over_refusal"]["safety"]
        assert found[name]["attack_success"]["asr"] + refusal == pytest.approx(1)
    assert found["judge"]["asr"] == pytest.approx(1 / 6) and found["empty_share"] == 0
    json.dumps(found)


ROWS, ANSWERS = rows_and_answers()
PREFIX = {"prefix": refused_by_prefix}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judge_success([0]), r"\[1, 5\]"),
        (lambda: attack_success([], prompts=[], categories=[], styles=[]), "at least one row"),
        (lambda: attack_success([1.0], prompts=["p"], categories=[], styles=["s"]), "0 categories"),
        (lambda: attack_success([2.0], prompts=["p"], categories=["c"], styles=["s"]), r"\[0, 1\]"),
        (lambda: over_refusal([], [True]), "0 safe"),
        (lambda: compare_runs({"a": True}, {"b": True}), "none of the 1"),
        (lambda: evaluate_safety(ROWS, ANSWERS[:-1], detectors=PREFIX), "8 rows and 7"),
        (lambda: evaluate_safety([{"prompt": "p"}], ["a"], detectors=PREFIX), "row 0 has no .*category"),
        (lambda: evaluate_safety(ROWS[:3], ANSWERS[:3], detectors=PREFIX), "0 safe"),
        (lambda: evaluate_safety(ROWS, ANSWERS, detectors=PREFIX, judge_scores=[1]), "1 scores"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
