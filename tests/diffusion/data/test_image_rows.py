"""Image rows: every accepted form and file, every way a row can be bad, and files that are broken."""

import io
import json
import os
import pickle
import re
import tarfile

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from dpo_jax.diffusion.data.decoding import check_images, load_images
from dpo_jax.diffusion.data.parsing import parse_row
from dpo_jax.diffusion.data.places import FileBytes, MemoryBytes, ParquetBytes
from dpo_jax.diffusion.data.rows import check_rows, read_rows
from dpo_jax.rows import RowError


def png(level, size=(4, 6), kind="PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(data, kind)
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


def write_folder(folder, rows, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_folder(tmp_path):
    rows = [
        {"caption": "one", "chosen_file_name": "a.png", "rejected_file_name": "b.png"},
        {"caption": "two", "chosen": "b.png", "rejected": "a.png"},
        {"caption": "gone", "chosen": "c.png", "rejected": "a.png"},
        {"caption": "empty", "chosen": "empty.png", "rejected": "a.png"},
        {"caption": "more", "chosen": "a.png", "rejected": "b.png", "margin": 1},
        {"caption": "single", "file_name": "a.png"},
    ]
    folder = write_folder(tmp_path / "f", rows, {"a.png": GOOD, "b.png": BAD, "empty.png": b""})
    read = read_rows(folder, on_bad_row="skip")
    assert [(row.caption, levels(row)) for row in read.rows] == [("one", [200, 50]), ("two", [50, 200])]
    assert read.rows[0].images[0] == FileBytes(str(folder / "a.png"))
    reasons = ["c.png is no file", "has no bytes", "columns ['margin'], but row 1", "one of singles, but row 1"]
    assert [bad.number for bad in read.skipped] == [3, 4, 5, 6]
    for bad, reason in zip(read.skipped, reasons, strict=True):
        assert reason in bad.reason and bad.file == str(folder / "metadata.jsonl")
    with pytest.raises(RowError, match=r"row 3: chosen is 'c.png'"):
        read_rows(folder)
    assert read_rows(folder / "metadata.jsonl", on_bad_row="skip") == read


def test_ties_are_dropped_or_kept():
    tied = {**PICKAPIC, "label_0": 0.5, "label_1": 0.5, "caption": "tie"}
    dropped = check_rows([PICKAPIC, tied])
    assert len(dropped.rows) == 1 and dropped.rows[0].columns == {}
    assert [(bad.number, bad.reason) for bad in dropped.ties] == [(2, "a tie")] and not dropped.skipped
    kept = check_rows([PICKAPIC, tied], ties="keep")
    assert [row.columns for row in kept.rows] == [{"tie": 0}, {"tie": 1}] and not kept.ties
    assert levels(kept.rows[1]) == [50, 200]


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_leaves_the_bytes_in_the_file(tmp_path, struct):
    cell = (lambda data: {"bytes": data, "path": None}) if struct else (lambda data: data)
    rows = [
        {"jpg_0": cell(png(i)), "jpg_1": cell(png(i + 100)), "label_0": [0.0, 1.0, 0.5][i % 3], "caption": f"{i}"}
        for i in range(9)
    ]
    rows[7]["jpg_1"] = None
    rows[4]["caption"] = None
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    read = read_rows(path, on_bad_row="skip")
    assert [row.number for row in read.rows] == [1, 2, 4, 7, 8]
    assert [bad.number for bad in read.skipped] == [5] and [bad.number for bad in read.ties] == [3, 6, 9]
    assert read.rows[3].images == (ParquetBytes(str(path), 1, 2, "jpg_1"), ParquetBytes(str(path), 1, 2, "jpg_0"))
    assert [levels(row) for row in read.rows[:4]] == [[100, 0], [1, 101], [103, 3], [106, 6]]
    checked = check_images(read.rows, on_bad_row="skip")
    assert [row.number for row in checked.rows] == [1, 2, 4, 7] and [seen.size for seen in checked.images[0]] == [
        (6, 4)
    ] * 2
    assert [(bad.number, bad.reason.split(":")[0]) for bad in checked.skipped] == [(8, "rejected image")]
    with pytest.raises(RowError, match=r"row 8: rejected image: the image (is missing|has no bytes)"):
        check_images(read.rows)


def test_broken_row_group_loses_only_itself(tmp_path):
    rows = [{"image": png(i), "caption": f"caption number {i}"} for i in range(6)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2, compression="zstd")
    group = parquet.ParquetFile(path).metadata.row_group(1)
    (column,) = [group.column(i) for i in range(2) if group.column(i).path_in_schema == "caption"]
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    read = read_rows(path, on_bad_row="skip")
    assert [row.number for row in read.rows] == [1, 2, 5, 6]
    assert [bad.number for bad in read.skipped] == [3] and "rows 3 to 4 are lost" in read.skipped[0].reason
    path.write_bytes(b"no parquet")
    with pytest.raises(RowError, match="expected a Parquet file"):
        read_rows(path)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


SAMPLES = [
    ("train/000.json", json.dumps({"caption": "one", "margin": 2}).encode()),
    ("train/000.chosen.png", GOOD),
    ("train/000.rejected.png", BAD),
    ("train/001.jpg_0", BAD),
    ("train/001.jpg_1", GOOD),
    ("train/001.label_0", b"0"),
    ("train/001.txt", b"two\n"),
    ("train/001.json", b'{"margin": 3}'),
    ("train/001.embedding.npy", b"xxx"),
]


def test_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", SAMPLES)
    read = read_rows(path)
    assert [(row.caption, levels(row), row.columns) for row in read.rows] == [
        ("one", [200, 50], {"margin": 2}),
        ("two", [200, 50], {"margin": 3}),
    ]
    assert isinstance(read.rows[0].images[0], FileBytes)
    single = write_tar(tmp_path / "b.tar", [("a.jpg", png(9, kind="JPEG")), ("a.txt", b"t"), ("a.cls", b"1")])
    assert levels(read_rows(single).rows[0]) == pytest.approx([9], abs=2)


def test_bad_samples_of_tar(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tmp_path / "bad.tar"
    members = [
        ("a.png", GOOD),
        ("a.txt", b"good"),
        ("b.png", GOOD),
        ("b.txt", b"\xff"),
        ("c.png", GOOD),
        ("d.png", b""),
        ("d.txt", b"d"),
        ("e.json", b"[1]"),
        ("f.png", GOOD),
        ("f.jpg", GOOD),
        ("g.png", GOOD),
        ("g.txt", b"good"),
    ]
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    read = read_rows(path, on_bad_row="skip")
    assert [(row.caption, row.number) for row in read.rows] == [("good", 1), ("good", 7)]
    reasons = [
        "expected UTF-8, but byte 0",
        "no caption",
        "has no bytes",
        "one JSON object",
        "has image twice",
        "plain",
    ]
    assert [bad.number for bad in read.skipped] == [2, 3, 4, 5, 6, 8]
    for bad, reason in zip(read.skipped, reasons, strict=True):
        assert reason in bad.reason


def test_broken_tars_lose_nothing_in_silence(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(5) for m in ((f"{i}.png", GOOD), (f"{i}.txt", b"t"))])
    data, cut = whole.read_bytes(), tmp_path / "cut.tar"
    for length, good in ((1024 * 5 + 100, 2), (1024 * 6, 3), (1024 * 6 + 100, 3)):
        cut.write_bytes(data[:length])
        read = read_rows(cut, on_bad_row="skip")
        assert len(read.rows) == good and 1 <= len(read.skipped) <= 2, (length, read.skipped)
    cut.write_bytes(data[: 1024 * 4] + b"\xff" * 512 + data[1024 * 4 + 512 :])
    read = read_rows(cut, on_bad_row="skip")
    assert len(read.rows) == 2 and "at byte 4096 the archive goes on" in read.skipped[0].reason
    cut.write_bytes(data + data)
    read = read_rows(cut, on_bad_row="skip")
    assert len(read.rows) == 5 and "second archive" in read.skipped[0].reason
    import gzip

    cut.write_bytes(gzip.compress(data))
    with pytest.raises(RowError, match="no tar file, or a compressed one"):
        read_rows(cut)
    with pytest.raises(ValueError, match="no known kind"):
        read_rows(tmp_path / "whole.tar.gz")


def test_empty_files(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n")
    (tmp_path / "a.tar").write_bytes(b"\0" * 10240)
    parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "a.parquet")
    for path in (tmp_path, tmp_path / "a.tar", tmp_path / "a.parquet"):
        with pytest.raises(RowError, match="row 1: the file has no rows"):
            read_rows(path)
    for name in ("x", "x.jsonl", "x.tar", "x.parquet"):
        with pytest.raises((FileNotFoundError, ValueError)):
            read_rows(tmp_path / name, on_bad_row="skip")


def test_bad_images_name_file_row_and_side(tmp_path):
    files = {"a.png": GOOD, "b.png": BAD[:50], "c.png": b"text", "d.png": BAD}
    rows = [{"caption": "x", "chosen": "a.png", "rejected": name} for name in ("d.png", "b.png", "c.png", "d.png")]
    read = read_rows(write_folder(tmp_path / "f", rows, files))
    checked = check_images(read.rows, on_bad_row="skip")
    assert [row.number for row in checked.rows] == [1, 4]
    assert [(os.path.basename(bad.file), bad.number) for bad in checked.skipped] == [
        ("metadata.jsonl", 2),
        ("metadata.jsonl", 3),
    ]
    with pytest.raises(RowError, match=r"metadata.jsonl, row 2: rejected image: the image is broken"):
        check_images(read.rows)


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


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tar_is_read_to_its_end(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    whole = bytearray(write_tar(folder / "a.tar", SAMPLES).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        whole[place] = data.draw(st.integers(0, 255))
    (folder / "a.tar").write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    read = read_rows(folder / "a.tar", on_bad_row="skip")
    assert len(read.rows) + len(read.skipped) + len(read.ties) >= 1
    check_images(read.rows, on_bad_row="skip")
    if len(read.rows) + len(read.ties) < 2:
        assert read.skipped


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_parquet_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    rows = [{**PICKAPIC, "caption": f"{i}"} for i in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    whole = bytearray((folder / "a.parquet").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    (folder / "a.parquet").write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    read = read_rows(folder / "a.parquet", on_bad_row="skip")
    assert read.rows or read.skipped or read.ties
    check_images(read.rows, on_bad_row="skip")


def test_memory_rows_are_counted_from_one():
    read = check_rows(iter([PAIR, {}]), name="mine", on_bad_row="skip")
    assert (read.rows[0].file, read.rows[0].number) == ("mine", 1)
    assert read.rows[0].images == (MemoryBytes(GOOD), MemoryBytes(BAD))
    assert (read.skipped[0].file, read.skipped[0].number) == ("mine", 2)
