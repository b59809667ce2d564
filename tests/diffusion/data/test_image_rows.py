"""Files of image rows: every accepted kind, files that are broken, and where a bad row stands."""

import io
import json
import os
import tarfile

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from dpo_jax.diffusion.data.decoding import check_images, load_images
from dpo_jax.diffusion.data.places import FileBytes, MemoryBytes, ParquetBytes
from dpo_jax.diffusion.data.rows import check_rows, read_rows
from dpo_jax.rows import RowError


def png(level, kind="PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 6), (level, 0, 0)).save(data, kind)
    return data.getvalue()


GOOD, BAD = png(200), png(50)
PAIR = {"caption": "c", "chosen": GOOD, "rejected": BAD}
PICKAPIC = {"jpg_0": BAD, "jpg_1": GOOD, "label_0": 0.0, "label_1": 1.0, "caption": "c"}


def levels(row):
    return [int(image[0, 0, 0]) for image in load_images(row)]


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
