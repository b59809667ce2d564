"""What decoding found is kept: nothing is decoded twice, changes are noticed, refusals keep their words."""

import io
import json
import os
import tarfile
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from dpo_jax.diffusion.data import decoding, places, seen
from dpo_jax.diffusion.data.decoding import check_images
from dpo_jax.diffusion.data.places import FileBytes
from dpo_jax.diffusion.data.rows import check_rows, read_rows
from dpo_jax.diffusion.data.seen import SeenImage, SeenRecord
from dpo_jax.rows import RowError


def png(level) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 6), (level, 0, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def decoded(monkeypatch) -> list[Any]:
    """What was decoded."""
    made: list[Any] = []
    real = decoding.decode

    def decode(place, **options):
        made.append(place)
        return real(place, **options)

    monkeypatch.setattr(decoding, "decode", decode)
    return made


def folder_of(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = []
    for number in range(4):
        (folder / f"{number}a.png").write_bytes(png(number))
        (folder / f"{number}b.png").write_bytes(png(number + 100) if number != 2 else png(9)[:50])
        rows.append({"caption": f"{number}", "chosen": f"{number}a.png", "rejected": f"{number}b.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tar_of(tmp_path):
    path = tmp_path / "rows.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            bad = png(number + 100) if number != 2 else png(9)[:50]
            for name, data in (("txt", b"c"), ("chosen.png", png(number)), ("rejected.png", bad)):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


def parquet_of(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [
        {
            "caption": f"{number}",
            "chosen": {"bytes": png(number), "path": None},
            "rejected": {"bytes": png(number + 100) if number != 2 else png(9)[:50], "path": "x.png"},
        }
        for number in range(4)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def look(path, tmp_path, **options):
    """A start: rows read anew, images checked with the record as it is on disk."""
    given = {"on_mode": "convert", "max_pixels": 1 << 20, **options}
    record = SeenRecord(tmp_path / "cache" / "seen", **given)
    return check_images(read_rows(path).rows, on_bad_row="skip", record=record, **given), record


@pytest.mark.parametrize("make", [folder_of, tar_of, parquet_of])
def test_a_second_start_decodes_nothing_and_says_the_same(make, tmp_path, decoded):
    path = make(tmp_path)
    first, _ = look(path, tmp_path)
    assert len(decoded) == 8
    assert [row.number for row in first.rows] == [1, 2, 4] and [bad.number for bad in first.skipped] == [3]
    assert first.skipped[0].reason.startswith("rejected image: the image is broken or cut off")
    files = sorted((tmp_path / "cache" / "seen").iterdir())
    again, record = look(path, tmp_path)
    assert len(decoded) == 8 and again == first and not record.broken
    assert sorted((tmp_path / "cache" / "seen").iterdir()) == files
    with pytest.raises(RowError) as plain:
        check_images(read_rows(path).rows)
    with pytest.raises(RowError) as known:
        check_images(read_rows(path).rows, record=record)
    assert str(known.value) == str(plain.value)


@pytest.mark.parametrize("make", [folder_of, tar_of, parquet_of])
def test_a_record_says_what_decoding_would(make, tmp_path):
    path = make(tmp_path)
    look(path, tmp_path)
    assert look(path, tmp_path)[0] == check_images(read_rows(path).rows, on_bad_row="skip")


def test_a_changed_file_is_decoded_again(tmp_path, decoded):
    folder = folder_of(tmp_path)
    first, _ = look(folder, tmp_path)
    changed = folder / "1a.png"
    before = changed.stat()
    assert len(png(77)) == before.st_size
    changed.write_bytes(png(77))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    again, _ = look(folder, tmp_path)
    assert len(decoded) == 9
    assert again.images[1][0].key != first.images[1][0].key
    assert again.images[0] == first.images[0] and again.images[1][1] == first.images[1][1]
    (folder / "2b.png").write_bytes(png(3))  # what was refused is mended
    mended, _ = look(folder, tmp_path)
    assert len(decoded) == 10 and not mended.skipped and len(mended.rows) == 4


def test_a_changed_tar_is_decoded_again(tmp_path, decoded):
    path = tar_of(tmp_path)
    look(path, tmp_path)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    look(path, tmp_path)
    assert len(decoded) == 16


def test_other_options_are_other_findings(tmp_path, decoded):
    folder = folder_of(tmp_path)
    look(folder, tmp_path)
    small, _ = look(folder, tmp_path, max_pixels=20)
    assert len(decoded) == 8 + 4 and not small.rows  # a row is left at its first bad image
    strict, _ = look(folder, tmp_path, on_mode="error")
    assert len(decoded) == 20 and len(strict.rows) == 3
    assert look(folder, tmp_path, max_pixels=20)[0] == small and len(decoded) == 20


def test_a_broken_part_is_passed_over(tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(seen, "_PART", 2)
    folder = folder_of(tmp_path)
    first, _ = look(folder, tmp_path)
    parts = sorted((tmp_path / "cache" / "seen").glob("*.json"))
    assert len(parts) >= 3
    lost = len(json.loads(parts[0].read_bytes()))
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    again, record = look(folder, tmp_path)
    assert record.broken == [parts[0]] and again == first and len(decoded) == 8 + lost
    parts[1].write_bytes(parts[1].read_bytes().replace(b"6, 4", b"4, 6"))
    (tmp_path / "cache" / "seen" / "x.json").write_bytes(b"")
    again, record = look(folder, tmp_path)
    assert len(record.broken) >= 2 and again == first
    again, record = look(folder, tmp_path)
    assert not record.broken and again == first


def test_what_was_found_before_a_kill_is_kept(tmp_path, decoded, monkeypatch):
    folder = folder_of(tmp_path)
    monkeypatch.setattr(seen, "_PART", 2)
    monkeypatch.setattr(decoding, "THREADS", 1)
    real, written, count = decoding.read_bytes, SeenRecord.write, 0

    def read(place):
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        return real(place)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "read_bytes", read)
        patch.setattr(SeenRecord, "write", lambda self: written(self) if len(self._fresh) >= 2 else None)
        with pytest.raises(KeyboardInterrupt):
            look(folder, tmp_path)
    before = len(decoded)
    assert before == 5
    look(folder, tmp_path)
    assert len(decoded) == before + 8 - 4  # four of the five had been written in two parts


def test_a_file_that_cannot_be_read_now_is_no_finding(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(places, "open", lambda *names: (_ for _ in ()).throw(PermissionError("no")), raising=False)
        none, _ = look(folder, tmp_path)
    assert len(none.skipped) == 4 and "cannot be read" in none.skipped[0].reason
    assert not (tmp_path / "cache").exists()
    assert len(look(folder, tmp_path)[0].rows) == 3


def test_a_lack_of_memory_is_no_finding(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", lambda *args: (_ for _ in ()).throw(MemoryError))
        none, _ = look(folder, tmp_path)
    assert len(none.skipped) == 4
    assert len(look(folder, tmp_path)[0].rows) == 3


def test_files_behind_names_in_cells_are_read_each_time(tmp_path, decoded):
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"caption": "c", "chosen": {"bytes": None, "path": "a.png"}, "rejected": {"bytes": png(2), "path": None}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, _ = look(tmp_path / "rows.parquet", tmp_path)
    (tmp_path / "a.png").write_bytes(png(3))
    again, _ = look(tmp_path / "rows.parquet", tmp_path)
    assert len(decoded) == 3 and again.images[0][0].key != first.images[0][0].key


def test_images_in_memory_are_not_kept(tmp_path):
    record = SeenRecord(tmp_path / "seen", on_mode="convert", max_pixels=1 << 20)
    rows = check_rows([{"caption": "c", "image": png(1)}, {"caption": "c", "image": np.zeros((2, 2, 3), np.uint8)}])
    checked = check_images(rows.rows, record=record)
    assert len(checked.rows) == 2 and not (tmp_path / "seen").exists()
    assert record.key(FileBytes(str(tmp_path / "missing.png"))) is None
    assert isinstance(checked.images[0][0], SeenImage)
