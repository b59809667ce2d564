"""One row of images: every accepted form, every way to be bad, and nothing that is lost without a word."""

import io
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpo_jax.diffusion.data.decoding import load_images
from dpo_jax.diffusion.data.parsing import parse_row
from dpo_jax.rows import RowError


def png(level) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 6), (level, 0, 0)).save(data, "PNG")
    return data.getvalue()


GOOD, BAD = png(200), png(50)
PAIR = {"caption": "c", "chosen": GOOD, "rejected": BAD}
PICKAPIC = {"jpg_0": BAD, "jpg_1": GOOD, "label_0": 0.0, "label_1": 1.0, "caption": "c"}
NUMBERED = {"caption": "c", "image_0": GOOD, "image_1": BAD}


def levels(row):
    return [int(image[0, 0, 0]) for image in load_images(row)]


@pytest.mark.parametrize(
    "row, form, expected, columns",
    [
        (PAIR, "pairs", [200, 50], {}),
        ({**PAIR, "margin": 1.5, "tags": ["x"], "caption": ""}, "pairs", [200, 50], {"margin": 1.5}),
        ({"prompt": "p", "image_0": GOOD, "image_1": BAD, "label_0": 1}, "pairs", [200, 50], {"tie": 0}),
        ({"prompt": "p", "image_0": GOOD, "image_1": BAD, "label_0": 0}, "pairs", [50, 200], {"tie": 0}),
        ({"prompt": "p", "image_0": GOOD, "image_1": BAD, "label_1": 1}, "pairs", [50, 200], {"tie": 0}),
        ({"prompt": "p", "image_0": GOOD, "image_1": BAD, "label": 0}, "pairs", [200, 50], {"tie": 0}),
        ({"prompt": "p", "image_0": GOOD, "image_1": BAD, "label": 1}, "pairs", [50, 200], {"tie": 0}),
        ({"prompt": "p", "image_0": GOOD, "image_1": BAD, "label": 0.5}, "pairs", [200, 50], {"tie": 1}),
        (
            {**PICKAPIC, "score_0": 1.0, "score_1": 3.0, "user_id": 7, "has_label": True, "size_0": 4},
            "pairs",
            [200, 50],
            {"tie": 0, "rejected_score": 1.0, "chosen_score": 3.0, "size_0": 4},
        ),
        (
            {**PICKAPIC, "ps_score_0": 1.5, "ps_score_1": 0.5, "ps_label_0": 1, "ps_label_1": 0},
            "pairs",
            [200, 50],
            {"tie": 0, "rejected_score": 1.5, "chosen_score": 0.5},
        ),
        (
            {**NUMBERED, "pickscore_0": 1, "pickscore_1": 2, "ps_label_0": 0},
            "pairs",
            [50, 200],
            {"tie": 0, "rejected_score": 1, "chosen_score": 2},
        ),
        ({**NUMBERED, "label_0": 1, "label_1": 0, "label": 0, "tie": 0}, "pairs", [200, 50], {"tie": 0}),
        ({**PAIR, "prompt": "c", "tie": 1, "has_label": True}, "pairs", [200, 50], {"tie": 1}),
        (
            {**PAIR, "margin": np.float32(1.5), "state": np.ones((1, 2), np.float32), "source": "3.5"},
            "pairs",
            [200, 50],
            {"margin": 1.5, "state": [[1.0, 1.0]]},
        ),
        ({"text": "t", "image": GOOD, "labels": 0, "entity": "dog"}, "singles", [200], {"labels": 0}),
        ({"text": "t", "image": GOOD, "label": True}, "singles", [200], {"labels": True}),
        ({"text": "t", "image": {"bytes": GOOD, "path": None}}, "singles", [200], {}),
        ({"text": "t", "image": Image.new("RGB", (2, 2), (9, 0, 0))}, "singles", [9], {}),
        ({"text": "t", "image": np.full((2, 3, 3), 8, np.uint8)}, "singles", [8], {}),
        (
            {"text": "t", "images": [GOOD, BAD, png(1)], "scores": [3, 2, 1]},
            "lists",
            [200, 50, 1],
            {"scores": [3, 2, 1]},
        ),
    ],
)
def test_forms(row, form, expected, columns):
    read = parse_row(row, file="f", number=3)
    assert (read.form, levels(read), read.columns) == (form, expected, columns)
    assert (read.file, read.number, read.caption) == ("f", 3, row.get("caption", row.get("prompt", row.get("text"))))


@pytest.mark.parametrize(
    "row, expected",
    [
        ([1], "expected an object"),
        ({"chosen": GOOD, "rejected": BAD}, "no caption among the keys ['chosen', 'rejected']"),
        ({**PAIR, "caption": 3}, "caption should be text, got a number"),
        ({**PAIR, "caption": "\ud800"}, "half of a surrogate pair"),
        ({"caption": "c"}, "no images among the keys"),
        ({"caption": "c", "chosen": GOOD}, "there is chosen, but no rejected"),
        ({"caption": "c", "chosen": None, "rejected": GOOD}, "there is rejected, but no chosen"),
        ({**PAIR, "chosen": b""}, "chosen has no bytes"),
        ({**PAIR, "chosen": 3}, "chosen should be the path of an image"),
        ({**PAIR, "chosen": "missing.png"}, "is no file"),
        ({**PAIR, "chosen": "."}, "is no file"),
        ({**PAIR, "chosen": "a\0b"}, "'a\\x00b'"),
        ({**PAIR, "chosen": "x" * 5000}, "xxxx"),
        ({**PAIR, "chosen": "https://example.org/a.png"}, "fetch the image first"),
        ({**PAIR, "chosen": BAD}, "the images chosen and rejected are not all different"),
        ({**PAIR, "chosen": np.zeros((2, 2), np.uint8)}, "expected uint8 [H, W, 3]"),
        ({**PAIR, "margin": float("nan")}, "column 'margin' holds nan"),
        ({**PICKAPIC, "label_0": 0.7}, "label_0 is 0.7"),
        ({**PICKAPIC, "label_0": 1.0}, "expected a sum of 1"),
        ({**PICKAPIC, "has_label": False}, "has_label is false"),
        ({"caption": "c", "jpg_0": GOOD, "jpg_1": BAD}, "a pair without a label"),
        ({"caption": "c", "jpg_0": GOOD, "jpg_1": BAD, "label": 2}, "label is 2"),
        ({"caption": "c", "jpg_0": GOOD, "jpg_1": BAD, "label": [1, 0]}, "label is [1, 0]"),
        ({"caption": "c", "image": GOOD, "label": 0.5}, "expected true or false"),
        ({"caption": "c", "images": []}, "at least one image"),
        ({"caption": "c", "images": [GOOD, BAD], "scores": [1]}, "1 scores for 2 images"),
        ({"caption": "c", "images": [GOOD, GOOD]}, "not all different"),
        # What says two things at once.
        ({**PAIR, "prompt": "d"}, "caption and prompt are different captions"),
        ({**PAIR, "prompt": 3}, "prompt should be text, got a number"),
        ({**PAIR, "image_0": GOOD, "image_1": BAD, "label": 0}, "there is chosen beside image_0"),
        ({**PAIR, "image": GOOD}, "there is chosen beside image"),
        ({**PAIR, "chosen_file_name": "x.png"}, "there are chosen and rejected and chosen_file_name"),
        ({"caption": "c", "image": GOOD, "jpg": GOOD}, "there are image and jpg"),
        ({"caption": "c", "image": GOOD, "images": [GOOD]}, "there is images beside image"),
        ({"caption": "c", "entity": GOOD}, "there is entity, but no generated"),
        ({**PAIR, "label": 0}, "there is label beside chosen and rejected, which say already who won"),
        ({**PAIR, "label_1": 1}, "there is label_1 beside chosen and rejected"),
        ({**PAIR, "labels": [1, 0]}, "there is labels beside chosen and rejected"),
        ({**PAIR, "has_label": False}, "has_label is false"),
        ({**PAIR, "score_0": 1, "score_1": 2}, "there is score_0 beside chosen and rejected; name it chosen_score or"),
        ({**PAIR, "tie": 2}, "tie is 2"),
        ({**NUMBERED, "label": 1, "label_0": 1}, "label_0 is 1 and label is 1, which do not agree"),
        ({**NUMBERED, "label": True}, "label is True; expected the index of the winner"),
        ({**NUMBERED, "label_0": 1, "labels": 1}, "there is labels of a pair"),
        ({**NUMBERED, "label_0": 1, "tie": 1}, "tie is 1, which is not what the label says"),
        ({**NUMBERED, "label_0": 1, "score_0": 1}, "there is score_0, but no score_1"),
        ({**NUMBERED, "label_0": 1, "ps_score_1": 1}, "there is ps_score_1, but no ps_score_0"),
        (
            {**NUMBERED, "label_0": 1, "score_0": 1, "score_1": 2, "chosen_score": 3},
            "score_0 are both chosen_score",
        ),
        (
            {**NUMBERED, "label_0": 1, "score_0": 1, "score_1": 2, "ps_score_0": 1, "ps_score_1": 2},
            "ps_score_0 and score_0 are both chosen_score",
        ),
        ({**PICKAPIC, "has_label": "no"}, "has_label should be true or false, got text 'no'"),
        ({"caption": "c", "image": GOOD, "label": 1, "labels": 0}, "there is label beside labels"),
        ({"caption": "c", "image": GOOD, "labels": 2}, "labels is 2"),
        ({"caption": "c", "image": GOOD, "tie": 1}, "there is tie of a single image"),
        ({"caption": "c", "image": GOOD, "label_0": 1}, "there is label_0 of a single image"),
        ({"caption": "c", "images": [GOOD, BAD], "label": 1}, "there is label of a list"),
        ({"caption": "c", "images": [GOOD, BAD], "scores": [[1], [2]]}, "scores holds lists"),
        ({"caption": "c", "entity": GOOD, "generated": BAD, "tie": 1}, "there is tie of entity and generated"),
        # Quantities that are no numbers.
        ({**PAIR, "chosen_score": "3.5"}, "chosen_score should be a number or a list of numbers, got text '3.5'"),
        ({**NUMBERED, "label_0": 1, "score_0": "1", "score_1": 2}, "score_0 should be a number"),
        ({"caption": "c", "image": GOOD, "label": "false"}, "label should be a number or a list of numbers, got text"),
        ({"caption": "c", "images": [GOOD, BAD], "scores": [1, None]}, "scores should be a number or a list of"),
        ({**PAIR, "reward_gap": []}, "reward_gap should be a number or a list of numbers, got an empty list"),
        ({**PAIR, 3: 4}, "the key 3 is a number"),
    ],
)
def test_bad_row_says_where_and_why(row, expected):
    with pytest.raises(RowError) as error:
        parse_row(row, file="f.jsonl", number=7)
    assert str(error.value).startswith("f.jsonl, row 7: ")
    assert expected in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3)
nested = st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
likely = st.sampled_from([GOOD, BAD, {"bytes": GOOD}, {"path": "x"}, 0, 1, True, 0.5, "c", "3.5", [GOOD, BAD], [1, 2]])
PLAIN_KEYS = ("margin", "source", "size_0", "size_1", "state")
keys = st.sampled_from(
    (
        *("caption", "prompt", "chosen", "rejected", "image_0", "image_1", "image", "images", "file_name"),
        *("label", "label_0", "label_1", "labels", "score_0", "score_1", "scores", "tie", "has_label", "chosen_score"),
        *("ps_score_0", "ps_score_1", "ps_label_0", "chosen_caption", "rejected_caption", "entity", "generated"),
        *PLAIN_KEYS,
    )
)
whole = st.sampled_from(
    [
        PAIR,
        PICKAPIC,
        {**NUMBERED, "label": 1},
        {"caption": "c", "image": GOOD},
        {"caption": "c", "image": GOOD, "rejected_caption": "d"},
        {"caption": "c", "images": [GOOD, BAD], "scores": [2, 1]},
        {"caption": "c", "entity": GOOD, "generated": BAD},
    ]
)


def kept_as(name, read):
    """The columns one of which has to hold a number that stands in a row under a name, so that nothing is lost."""
    if name in ("label", "label_0", "label_1", "ps_label_0"):
        return {name} if read.form == "patches" else {"labels"} if read.form == "singles" else {"tie"}
    if name.startswith("ps_score_"):
        return {"chosen_score", "rejected_score", name}
    return {name, f"chosen_{name[:-2]}", f"rejected_{name[:-2]}"}


@settings(max_examples=300, deadline=None)
@given(whole | st.just({}), st.dictionaries(keys, likely | nested, max_size=3) | values | st.lists(nested))
def test_any_row_is_read_whole_or_refused_by_the_name_of_a_key(good, more):
    row = {**good, **more} if isinstance(more, dict) else more
    try:
        read = parse_row(row)
    except RowError as error:
        named = re.findall(r"\w+", error.reason)
        assert not isinstance(row, dict) or not row or any(str(key) in named for key in row) or "caption" in named
        return
    assert isinstance(read.caption, str) and {row[key] for key in ("caption", "prompt") if row.get(key)} <= {
        read.caption
    } | set(read.captions)
    assert len(read.images) == (2 if read.form in ("pairs", "patches") else len(row.get("images") or [0]))
    images = [key for key in row if key in ("chosen", "image_0", "jpg_0", "image", "images", "file_name")]
    assert sum(row[key] is not None for key in images) == (read.form != "patches")
    for name, value in row.items():
        if isinstance(value, (bool, int, float)) and name not in ("has_label", *images):
            assert kept_as(name, read) & read.columns.keys(), (name, read.columns)
        if isinstance(value, str) and name not in (*PLAIN_KEYS, "entity", "generated", *images):
            assert value in (read.caption, *read.captions), name


@settings(max_examples=150, deadline=None)
@given(first=st.sampled_from([0, 0.5, 1]), label=st.sampled_from([0, 0.5, 1]), scores=st.tuples(*[st.integers()] * 2))
def test_scores_stay_with_their_images(first, label, scores):
    row = {**NUMBERED, "label_0": first, "label": label, "score_0": scores[0] % 99, "score_1": scores[1] % 99}
    if first + label != 1:
        with pytest.raises(RowError, match="which do not agree"):
            parse_row(row)
        return
    read = parse_row(row)
    known = {200: row["score_0"], 50: row["score_1"]}
    assert [known[level] for level in levels(read)] == [
        read.columns[f"{side}_score"] for side in ("chosen", "rejected")
    ]
