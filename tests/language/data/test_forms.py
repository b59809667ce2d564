"""Rows of one form as rows of another: what they keep, what has no such form, what cannot be asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.language.data.forms import FormError, to_form
from dpo_jax.language.data.rows import PreferenceRow, check_rows, parse_row
from dpo_jax.language.types import COMPLETIONS

PAIR = parse_row({"prompt": "p", "chosen": "good", "rejected": "bad", "margin": 2.0, "chosen_score": 3})
LIST = parse_row({"prompt": "p", "completions": ["a", "b", "c", "d"], "scores": [1, 7, 7, 0], "topic": 5})
TRIPLE = parse_row({"prompt": "p", "gold": "best", "chosen": "good", "rejected": "bad"})
SINGLE = parse_row({"prompt": "p", "completion": "a", "label": True})


def test_forms_are_read_off_the_keys():
    assert (PAIR.form, LIST.form, TRIPLE.form, SINGLE.form) == ("pairs", "lists", "triples", "singles")
    assert TRIPLE.completions == ("good", "bad", "best")
    alias = parse_row({"prompt": "p", "reference": "best", "chosen": "good", "rejected": "bad"})
    assert alias.completions == TRIPLE.completions and alias.form == "triples"
    items = [{"text": "a", "score": 2, "model": "m"}, {"text": "b", "score": 0.5}]
    assert parse_row({"prompt": "p", "responses": items}).columns == {"scores": [2, 0.5]}
    assert parse_row({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1}).columns == {"chosen_score": 1}
    step = parse_row({"prompt": "p", "initial_reason_steps": "Step 1:", "chosen": "a", "rejected": "b"})
    assert step.prefix == "Step 1:" and step.form == "pairs"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "p", "completion": "a", "label": 2}, "label is 2; expected true or false"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": [1]}, "1 scores for 2 completions"),
        ({"prompt": "p", "completions": ["a", "b"], "scores": 1}, "no list of scores"),
        ({"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b"}]}, "1 of 2 items of responses"),
        (
            {"prompt": "p", "responses": [{"text": "a", "score": "high"}, {"text": "b", "score": 1}]},
            "should be a number",
        ),
        ({"prompt": "p", "responses": [{"answer": "a"}]}, 'should be text or {"text", "score"}'),
        ({"prompt": "p", "responses": [{"text": "a", "score": float("nan")}, {"text": "b", "score": 1}]}, "holds nan"),
    ],
)
def test_bad_lists_and_labels(row, reason):
    with pytest.raises(ValueError, match="rows, row 1") as error:
        check_rows([row])
    assert reason in str(error.value)


def test_lists_become_pairs_of_the_best_and_the_worst():
    (pair,), left_out = to_form([LIST], "pairs")
    assert pair.completions == ("b", "d") and pair.form == "pairs" and not left_out
    assert pair.columns == {"topic": 5, "chosen_score": 7, "rejected_score": 0, "list_scores": [1, 7, 7, 0]}
    unscored = parse_row({"prompt": "p", "completions": ["a", "b", "c"]})
    assert to_form([unscored], "pairs").rows[0].completions == ("a", "c")


def test_lists_become_triples():
    (triple,), _ = to_form([LIST], "triples")
    assert triple.completions == ("c", "d", "b")  # chosen, rejected, gold; ties in list order
    assert triple.columns["chosen_score"] == 7 and triple.columns["rejected_score"] == 0


def test_what_has_no_such_form_is_left_out_with_a_reason():
    tied = parse_row({"prompt": "p", "completions": ["a", "b"], "scores": [1, 1]}, file="f", number=4)
    one = parse_row({"prompt": "p", "completions": ["a"], "scores": [1]}, file="f", number=5)
    rows, left_out = to_form([LIST, tied, one], "pairs")
    assert len(rows) == 1 and [(r.file, r.number) for r in left_out] == [("f", 4), ("f", 5)]
    assert "equal" in left_out[0].reason and "one item" in left_out[1].reason
    assert "2 items has no triple" in to_form([tied], "triples").left_out[0].reason


def test_pairs_become_labelled_singles():
    rows, _ = to_form([PAIR], "singles")
    assert [(r.completions, r.columns) for r in rows] == [
        (("good",), {"margin": 2.0, "labels": 1}),
        (("bad",), {"margin": 2.0, "labels": 0}),
    ]
    assert [r.completions for r in to_form([LIST], "singles").rows] == [("b",), ("d",)]


def test_mismatched_completions_come_from_other_prompts():
    pairs = [parse_row({"prompt": f"p{i % 3}", "chosen": f"good{i}", "rejected": f"bad{i}"}) for i in range(9)]
    rows, _ = to_form(pairs, "mismatched", seed=1)
    prompt_of = {text: pair.prompt for pair in pairs for text in pair.completions}
    assert len(rows) == 18
    for row in rows:
        assert len(row.completions) == len(COMPLETIONS["mismatched"])
        assert prompt_of[row.completions[0]] == row.prompt != prompt_of[row.completions[1]]
    assert to_form(pairs, "mismatched", seed=1).rows == rows != to_form(pairs, "mismatched", seed=2).rows
    with pytest.raises(FormError, match="fewer than two different prompts"):
        to_form([PAIR, PAIR], "mismatched")


def test_revisions_hold_both_answers_after_each_other():
    (row,), _ = to_form([PAIR], "revisions", revision_instruction="Again.")
    assert row.completions == ("good", "bad") * 3
    assert row.contexts[:2] == ((), ())
    assert [context[0]["content"] for context in row.contexts[2:]] == ["good", "good", "bad", "bad"]
    assert {context[1]["content"] for context in row.contexts[2:]} == {"Again."}
    given = ["_given_".join(n.split("_given_")[:2]) for n in COMPLETIONS["revisions"]]
    assert given[2:] == [
        "chosen_given_chosen",
        "rejected_given_chosen",
        "chosen_given_rejected",
        "rejected_given_rejected",
    ]


def test_all_forms_become_lists():
    assert to_form([PAIR], "lists").rows[0].columns["scores"] == [1.0, 0.0]
    scored = parse_row({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 9, "rejected_score": 4})
    assert to_form([scored], "lists").rows[0].columns["scores"] == [9, 4]
    (triple,), _ = to_form([TRIPLE], "lists")
    assert triple.completions == ("best", "good", "bad") and triple.columns["scores"] == [1.0, 0.5, 0.0]
    assert to_form([LIST], "lists").rows[0].columns["scores"] == [1, 7, 7, 0]
    assert "scores" not in to_form([SINGLE], "lists").rows[0].columns


@pytest.mark.parametrize(
    "row, form, needed",
    [(SINGLE, "pairs", "chosen and rejected"), (PAIR, "triples", "gold"), (SINGLE, "revisions", "chosen and rejected")],
)
def test_what_cannot_be_made_says_what_is_needed(row, form, needed):
    with pytest.raises(FormError, match=needed):
        to_form([row], form)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost_on_the_way_to_pairs(scores):
    rows = [
        PreferenceRow(f"p{i}", tuple(f"{i}.{k}" for k in range(len(s))), {"scores": s}, "f", i, "lists")
        for i, s in enumerate(scores)
    ]
    pairs, left_out = to_form(rows, "pairs")
    assert sorted([r.number for r in pairs] + [r.number for r in left_out]) == list(range(len(rows)))
    for pair in pairs:
        given_scores = scores[pair.number]
        assert pair.columns["chosen_score"] == max(given_scores) > pair.columns["rejected_score"] == min(given_scores)
