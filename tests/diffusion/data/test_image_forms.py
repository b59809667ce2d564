"""Rows of images from one form to another: what becomes of images, captions, labels, scores and columns."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpo_jax.diffusion.data.forms import FormError, to_form
from dpo_jax.diffusion.data.parsing import ImageRow, parse_row
from dpo_jax.diffusion.data.places import MemoryBytes
from dpo_jax.diffusion.data.rows import check_rows
from dpo_jax.rows import RowError

A, B, C = (MemoryBytes(letter) for letter in (b"a", b"b", b"c"))


def row(form, *images, caption="c", captions=(), number=1, **columns) -> ImageRow:
    return ImageRow(caption, images, columns, "f", number, form, captions)


def facts(rows):
    return [(r.form, r.images, r.captions or r.caption, dict(r.columns)) for r in rows]


PAIR = row("pairs", A, B, chosen_score=3.0, rejected_score=1.0, margin=2.0, chosen_extra=7, tie=0)
LIST = row("lists", A, B, C, scores=[2.0, 5.0, 2.0], margin=2.0)
OWN = row("pairs", A, B, captions=("x", "y"), margin=2.0)

WAYS = [
    (PAIR, "singles", [((A,), "c", {"margin": 2.0, "labels": 1}), ((B,), "c", {"margin": 2.0, "labels": 0})]),
    (OWN, "singles", [((A,), "x", {"margin": 2.0, "labels": 1}), ((B,), "y", {"margin": 2.0, "labels": 0})]),
    (PAIR, "experts", [((A,), "c", {"margin": 2.0})]),
    (OWN, "experts", [((A,), "x", {"margin": 2.0})]),
    (PAIR, "lists", [((A, B), "c", {"margin": 2.0, "scores": [3.0, 1.0]})]),
    (OWN, "lists", [((A, B), ("x", "y"), {"margin": 2.0, "scores": [1.0, 0.0]})]),
    (LIST, "pairs", [((B, A), "c", {"margin": 2.0, "chosen_score": 5.0, "rejected_score": 2.0})]),
    (
        LIST,
        "singles",
        [
            ((A,), "c", {"margin": 2.0, "labels": 0}),
            ((B,), "c", {"margin": 2.0, "labels": 1}),
            ((C,), "c", {"margin": 2.0, "labels": 0}),
        ],
    ),
    (LIST, "experts", [((B,), "c", {"margin": 2.0})]),
    (row("singles", A, labels=1), "experts", [((A,), "c", {})]),
    (row("singles", A), "experts", [((A,), "c", {})]),
]


@pytest.mark.parametrize("given_row, form, expected", WAYS)
def test_every_way(given_row, form, expected):
    made = to_form([given_row], form)
    assert facts(made) == [(form, *rest) for rest in expected]
    assert all((new.file, new.number) == ("f", 1) for new in made)


@pytest.mark.parametrize("form", ["pairs", "singles", "lists", "experts", "mismatched", "patches"])
def test_no_rows_and_rows_of_the_form_already(form):
    assert to_form([], form) == []
    rows = [row(form, A), row(form, B)]
    assert to_form(rows, form) == rows


@pytest.mark.parametrize(
    "rows, form, said",
    [
        ([row("singles", A)], "pairs", "the rows are singles, and pairs are made of lists"),
        ([row("singles", A)], "lists", "the rows are singles, and lists are made of pairs"),
        ([PAIR], "patches", "the rows are pairs, and patches are made of nothing else"),
        ([row("lists", A, B, number=7)], "pairs", "row 7 of f is a list without `scores`"),
        ([row("lists", A, B, scores=[1, 1])], "pairs", "none of the 1 rows of lists gives one of pairs"),
        ([row("singles", A, labels=0)], "experts", "none of the 1 rows of singles gives one of experts"),
        ([PAIR], "mismatched", "at least two captions"),
        ([row("lists", A, B)], "mismatched", "without `scores`"),
    ],
)
def test_where_there_is_no_way(rows, form, said):
    with pytest.raises(FormError, match=said):
        to_form(rows, form)


def test_ties():
    tied = row("pairs", A, B, tie=1, margin=0.0)
    rows = [PAIR, tied]
    assert len(to_form(rows, "singles")) == 2
    assert to_form(rows, "lists")[1].columns == {"scores": [0.5, 0.5], "margin": 0.0}
    assert len(to_form([LIST, row("lists", A, B, scores=[1.0, 1.0])], "singles")) == 3


@settings(max_examples=60, deadline=None)
@given(captions=st.lists(st.sampled_from("xyz"), min_size=2, max_size=12), seed=st.integers(0, 5))
def test_mismatched_captions_always_differ(captions, seed):
    rows = [row("singles", MemoryBytes(bytes([n])), caption=c, labels=n % 2) for n, c in enumerate(captions)]
    if len(set(captions)) < 2:
        with pytest.raises(FormError):
            to_form(rows, "mismatched", seed=seed)
        return
    made = to_form(rows, "mismatched", seed=seed)
    assert [new.caption for new in made] == captions and [new.columns for new in made] == [r.columns for r in rows]
    for new, old in zip(made, rows, strict=True):
        first, second = new.captions
        assert first == old.caption and second != first and second in captions
        assert new.images == old.images * 2 and new.form == "mismatched"
    assert made == to_form(rows, "mismatched", seed=seed)


def test_mismatched_of_pairs_and_of_another_seed():
    rows = [row("pairs", A, B, caption=f"{n}", captions=(f"{n}", f"not {n}") if n else ()) for n in range(12)]
    made = to_form(rows, "mismatched")
    assert [new.captions[0] for new in made[:4]] == ["0", "0", "1", "not 1"]
    assert [new.columns["labels"] for new in made] == [1, 0] * 12
    assert made != to_form(rows, "mismatched", seed=1)


def png(level) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 6), (level, 0, 0)).save(data, "PNG")
    return data.getvalue()


GOOD, BAD = png(200), png(50)
SIDES = {"chosen": GOOD, "rejected": BAD}
NUMBERED = {"image_0": GOOD, "image_1": BAD}
OWN_NUMBERED = {"caption_0": "x", "caption_1": "y"}


@pytest.mark.parametrize(
    "given_row, images, captions, caption",
    [
        ({**SIDES, "chosen_caption": "x", "rejected_caption": "y"}, [GOOD, BAD], ("x", "y"), "x"),
        ({**SIDES, "caption": "c", "chosen_caption": "x", "rejected_caption": ""}, [GOOD, BAD], ("x", ""), "c"),
        ({**NUMBERED, **OWN_NUMBERED, "label": 0}, [GOOD, BAD], ("x", "y"), "x"),
        ({**NUMBERED, **OWN_NUMBERED, "label": 1}, [BAD, GOOD], ("y", "x"), "x"),
        ({**NUMBERED, **OWN_NUMBERED, "label_0": 0}, [BAD, GOOD], ("y", "x"), "x"),
        ({**NUMBERED, **OWN_NUMBERED, "label_1": 0}, [GOOD, BAD], ("x", "y"), "x"),
        ({**NUMBERED, **OWN_NUMBERED, "label": 0.5}, [GOOD, BAD], ("x", "y"), "x"),
        # Captions by side say themselves whose they are.
        ({**NUMBERED, "chosen_caption": "x", "rejected_caption": "y", "label": 1}, [BAD, GOOD], ("x", "y"), "x"),
        ({"image": GOOD, "caption": "c", "rejected_caption": "y"}, [GOOD, GOOD], ("c", "y"), "c"),
        ({"image": GOOD, "chosen_caption": "x", "rejected_caption": "y"}, [GOOD, GOOD], ("x", "y"), "x"),
    ],
)
def test_captions_of_each_image(given_row, images, captions, caption):
    read = parse_row(given_row)
    assert (read.form, read.captions, read.caption) == ("pairs", captions, caption)
    assert list(read.images) == [MemoryBytes(data) for data in images]


@pytest.mark.parametrize(
    "given_row, said",
    [
        ({**SIDES, "caption": "c", "chosen_caption": "x"}, "there is chosen_caption alone"),
        ({**SIDES, "caption": "c", "rejected_caption": "x"}, "there is rejected_caption alone"),
        ({**NUMBERED, "caption": "c", "caption_1": "x", "label": 0}, "there is caption_1 alone"),
        ({**SIDES, "chosen_caption": "x", "rejected_caption": 3}, "rejected_caption should be text"),
        ({**SIDES, "caption": "c", "chosen_caption": 3, "rejected_caption": "y"}, "chosen_caption should be text"),
        ({"image": GOOD, "caption": "c", "rejected_caption": ["y"]}, "rejected_caption should be text"),
        ({"image": GOOD, "rejected_caption": "y"}, "no caption among the keys"),
        (
            {"image": GOOD, "caption": "c", "rejected_caption": "c"},
            "caption and rejected_caption of the one image are the same",
        ),
        ({"image": GOOD, "caption": "c", "chosen_caption": "c"}, "chosen_caption"),
        ({"image": GOOD, "caption": "c", "caption_0": "c"}, "caption_0"),
        ({"images": [GOOD, BAD], "caption": "c", "rejected_caption": "d"}, "rejected_caption"),
        (
            {"image": GOOD, "caption": "c", "rejected_caption": "d", "label": 0},
            "label beside the image and rejected_caption",
        ),
        (
            {"image": GOOD, "caption": "c", "chosen_caption": "d", "rejected_caption": "e"},
            "chosen_caption and caption of",
        ),
        ({**SIDES, "chosen_caption": "c", "caption_1": "d"}, "there is chosen_caption and caption_1; expected"),
    ],
)
def test_captions_that_cannot_be_used(given_row, said):
    with pytest.raises(RowError, match=said):
        parse_row(given_row, file="f.jsonl", number=2)


TEXTS = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=2)
CAPTIONS = ("caption", "caption_0", "caption_1", "chosen_caption", "rejected_caption", "prompt")
IMAGES = st.sampled_from([SIDES, NUMBERED, {"image": GOOD}, {"images": [GOOD, BAD]}])


@settings(max_examples=200, deadline=None)
@given(IMAGES, st.dictionaries(st.sampled_from(CAPTIONS), TEXTS), st.sampled_from([None, 0, 1, 0.5, 2]))
def test_any_captions_are_a_row_or_a_row_error(images, captions, label):
    try:
        read = parse_row({**images, **captions, "label": label})
    except RowError as error:
        assert error.reason
        return
    assert isinstance(read.caption, str)
    assert len(read.captions) in (0, len(read.images)) and all(isinstance(text, str) for text in read.captions)
    if read.form == "pairs" and read.images[0] == read.images[1]:
        assert len(set(read.captions)) == 2


def test_rows_of_one_image_and_two_captions_lose_their_label():
    read = check_rows([{"image": GOOD, "caption": "c", "rejected_caption": "d", "weight": 2.0}])
    assert read.rows[0].columns == {"weight": 2.0}
    assert facts(to_form(read.rows, "singles")) == [
        ("singles", (MemoryBytes(GOOD),), "c", {"weight": 2.0, "labels": 1}),
        ("singles", (MemoryBytes(GOOD),), "d", {"weight": 2.0, "labels": 0}),
    ]


def test_scores_keep_their_types():
    assert np.isscalar(to_form([LIST], "pairs")[0].columns["chosen_score"])
