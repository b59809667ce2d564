"""Columns that are made from other columns and from texts."""

import numpy as np
import pytest

from dpo_jax.language.data.columns import RECIPES, ColumnError, advice, cross_fitted_logits, text_features, with_columns
from dpo_jax.language.data.forms import to_form
from dpo_jax.language.data.rows import parse_row


def pair(number=0, **columns):
    return parse_row({"prompt": f"p{number}", "chosen": f"good {number}", "rejected": f"bad {number}", **columns})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_columns_from_scores():
    wanted = ("margin", "label_prob", "chosen_win_prob", "rejected_win_prob", "is_tie")
    (row,) = with_columns([pair(chosen_score=2.0, rejected_score=0.5)], wanted)
    assert row.columns["margin"] == 1.5 and row.columns["is_tie"] == 0
    np.testing.assert_allclose(row.columns["label_prob"], sigmoid(1.5), rtol=1e-12)
    # An item's own duel counts one half.
    np.testing.assert_allclose(row.columns["chosen_win_prob"], (0.5 + sigmoid(1.5)) / 2, rtol=1e-12)
    np.testing.assert_allclose(row.columns["rejected_win_prob"], (0.5 + sigmoid(-1.5)) / 2, rtol=1e-12)


def test_win_probabilities_of_a_list_are_over_all_its_items():
    scores = [0.3, 2.0, -1.0, 0.0]
    (row,) = to_form([parse_row({"prompt": "p", "completions": list("abcd"), "scores": scores})], "pairs").rows
    (row,) = with_columns([row], ("chosen_win_prob", "rejected_win_prob"))
    expected = [np.mean([sigmoid(s - other) for other in scores]) for s in scores]
    np.testing.assert_allclose(row.columns["chosen_win_prob"], expected[1], rtol=1e-12)
    np.testing.assert_allclose(row.columns["rejected_win_prob"], expected[2], rtol=1e-12)


def test_targets_are_the_softmax_of_scores():
    (row,) = with_columns(
        [parse_row({"prompt": "p", "completions": ["a", "b"], "scores": [1e4, 0]})], ("target_probs",)
    )
    assert row.columns["target_probs"] == [1.0, 0.0]


def test_given_columns_win_and_what_cannot_be_made_is_left():
    (row,) = with_columns([pair(margin=9.0, chosen_score=1, rejected_score=0)], ("margin", "label_prob", "unknown"))
    assert row.columns["margin"] == 9.0 and "label_prob" in row.columns and "unknown" not in row.columns
    (bare,) = with_columns([pair()], ("margin", "guidance_logps", "labels"))
    assert bare.columns == {}
    for name in RECIPES:
        assert "give" in advice(name)
    assert "`strange`" in advice("strange")


def test_a_wrong_kind_is_one_clear_error():
    with pytest.raises(ColumnError, match=r"margin.*chosen_score, rejected_score"):
        with_columns([pair(chosen_score=[1, 2], rejected_score=0)], ("margin",))


def test_the_calibration_favours_the_trusted_source():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(200):
        golden = i % 3 == 0
        style = "kindly thanks" if golden else "synthetic style"
        words = " ".join(rng.choice(["one", "two", "three", "four"], 3))
        rows.append(
            parse_row({"prompt": f"p {words}", "chosen": f"{words} {style} a", "rejected": f"{words} {style} b"})
        )
        rows[-1].columns["golden"] = int(golden)  # type: ignore[index]
    made = with_columns(rows, ("calibration",))
    h = np.array([row.columns["calibration"] for row in made])
    golden = np.array([row.columns["golden"] for row in rows]) == 1
    np.testing.assert_allclose(h.mean(), 1.0, rtol=1e-6)
    assert (h >= 0).all() and h[golden].min() > 2 * h[~golden].max()
    with pytest.raises(ColumnError, match="rows of both kinds"):
        with_columns(rows[:1], ("calibration",))


def test_prompts_tell_desirable_rows_apart():
    rows = [
        parse_row({"prompt": f"{'math' if i % 2 else 'chat'} {i}", "completion": "a", "label": i % 2})
        for i in range(60)
    ]
    p = np.array([row.columns["prob_desirable"] for row in with_columns(rows, ("prob_desirable",))])
    assert (p[1::2] > 0.6).all() and (p[::2] < 0.4).all()


def test_a_row_is_not_judged_by_its_own_label():
    rng = np.random.default_rng(1)
    features, labels = rng.normal(size=(100, 5)), rng.integers(0, 2, 100)
    logits = cross_fitted_logits(features, labels)
    flipped = labels.copy()
    flipped[7] = 1 - flipped[7]
    assert cross_fitted_logits(features, flipped)[7] == logits[7]
    assert not cross_fitted_logits(features, np.ones(100)).any()  # one class alone


def test_features_are_unit_vectors_of_words():
    np.testing.assert_allclose(np.linalg.norm(text_features("a b b")), 1.0)
    np.testing.assert_array_equal(text_features("A  b"), text_features("b a"))
    assert not text_features("").any()
