"""Files of image rows: read a folder, JSONL, Parquet or tar file, check every row, say exactly where a bad one stands.

Folders hold `metadata.jsonl`. In tar files of the WebDataset form the members of one sample stand together and share
their name up to the first dot: `7.json` holds keys of the row, `7.txt` the caption, `7.jpg` the image, `7.chosen.png`
and `7.jpg_0` an image of a pair, `7.caption` or `7.label_0` a value. What a row may hold is told in `parsing`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_jax.diffusion.data.parsing import ImageRow, parse_row
from dpo_jax.diffusion.data.places import ParquetBytes
from dpo_jax.rows import OnBadRow, Record, RowError, SkippedRow, json_records

Ties = Literal["drop", "keep"]


class RowsRead(NamedTuple):
    """Good rows in the order of the files, the bad ones that were skipped, and the ties that were dropped."""

    rows: list[ImageRow]
    skipped: list[SkippedRow]
    ties: list[SkippedRow]


def read_rows(
    paths: str | Path | Sequence[str | Path], *, on_bad_row: OnBadRow = "error", ties: Ties = "drop"
) -> RowsRead:
    """Read and check the rows of files or folders, without decoding images.

    Args:
      paths: in order: folders with `metadata.jsonl`, and files `.jsonl`, `.jsonl.gz`, `.parquet` or `.tar`.
      on_bad_row: "error" raises at the first bad row; "skip" lists it in `skipped` and loses nothing else. A file that
        breaks off is one bad row after the last that could be read, a broken row group of Parquet one in its place.
      ties: "drop" lists pairs without a winner in `ties`; "keep" keeps them in the order of the row, marked by `tie`.

    Raises:
      RowError: a bad row, an empty or broken file (only with "error").
      OSError: a file that is missing or may not be read.
      ValueError: a file of another kind.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    records = ((record, folder) for path in paths for record, folder in _records(Path(path)))
    return _check(records, on_bad_row, ties)


def check_rows(
    rows: Iterable[Mapping[str, Any]], *, name: str = "rows", on_bad_row: OnBadRow = "error", ties: Ties = "drop"
) -> RowsRead:
    """The same checks for rows in memory: an iterable of mappings, a Hugging Face dataset; `name` stands for the file.

    Raises:
      RowError: a bad row (only with "error").
    """
    records = (((name, number, row), Path()) for number, row in enumerate(rows, 1))
    return _check(records, on_bad_row, ties)


def _check(records: Iterable[tuple[Record, Path]], on_bad_row: OnBadRow, ties: Ties) -> RowsRead:
    rows: list[ImageRow] = []
    skipped: list[SkippedRow] = []
    tied: list[SkippedRow] = []
    for (file, number, record), folder in records:
        try:
            if isinstance(record, RowError):
                raise record
            row = parse_row(record, file=file, number=number, folder=folder)
            if ties == "drop" and row.columns.get("tie"):
                tied.append(SkippedRow(file, number, "a tie"))
                continue
            if ties == "drop":
                row = _without_tie(row)
            if rows:
                _require_same_form(row, rows[0])
            rows.append(row)
        except RowError as error:
            if on_bad_row == "error":
                raise
            skipped.append(SkippedRow(error.file, error.number, error.reason))
    return RowsRead(rows, skipped, tied)


def _without_tie(row: ImageRow) -> ImageRow:
    columns = {name: value for name, value in row.columns.items() if name != "tie"}
    return replace(row, columns=columns)


def _require_same_form(row: ImageRow, first: ImageRow) -> None:
    """Batches have one shape: every row needs the form and the columns of the first one."""
    if row.form != first.form:
        reason = f"one of {row.form}, but row {first.number} of {first.file} is one of {first.form}"
        raise RowError(row.file, row.number, f"{reason}; give rows of one form")
    if row.frames != first.frames:
        raise RowError(row.file, row.number, f"{row.frames} frames, but row {first.number} has {first.frames}")
    if row.columns.keys() != first.columns.keys():
        reason = f"number columns {sorted(row.columns)}, but row {first.number} of {first.file} has "
        raise RowError(row.file, row.number, f"{reason}{sorted(first.columns)}; give all rows the same columns")


def _records(path: Path) -> Iterator[tuple[Record, Path]]:
    """Records of a file and the folder that its paths start from."""
    if path.is_dir():
        path = path / "metadata.jsonl"
    if path.suffix == ".parquet":
        read = _parquet_records
    elif path.suffix == ".tar":
        from dpo_jax.diffusion.data.tar import tar_records as read
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        read = json_records
    else:
        kinds = "a folder with metadata.jsonl, .jsonl, .jsonl.gz, .parquet or .tar (not compressed)"
        raise ValueError(f"{path} is of no known kind; expected {kinds}")
    number = 0
    for file, number, record in read(path):
        yield (file, number, record), path.parent
    if not number:
        yield (str(path), 1, RowError(str(path), 1, "the file has no rows")), path.parent


def _parquet_records(path: Path) -> Iterator[Record]:
    """Rows without their images' bytes: those stay in the file until they are wanted."""
    from pyarrow import ArrowException, parquet

    file, number, group = str(path), 0, 0
    path.stat()  # a missing file is an OSError, as for the other formats
    try:
        with parquet.ParquetFile(path) as opened:
            fields = list(opened.schema_arrow)
            images = [field.name for field in fields if _holds_bytes(field.type)]
            others = [field.name for field in fields if field.name not in images]
            for group in range(opened.num_row_groups):
                count = opened.metadata.row_group(group).num_rows
                try:
                    table = opened.read_row_group(group, columns=others)
                    rows = table.to_pylist() if others else [{} for _ in range(count)]
                except (ArrowException, OSError, UnicodeDecodeError) as error:
                    lost = f"rows {number + 1} to {number + count} are lost, their row group {group} is broken"
                    yield file, number + 1, RowError(file, number + 1, f"{lost} ({error})")
                    number += count
                    continue
                for index, row in enumerate(rows):
                    number += 1
                    cells = {name: ParquetBytes(file, group, index, name) for name in images}
                    yield file, number, {**row, **cells}
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        yield file, number + 1, RowError(file, number + 1, f"expected a Parquet file with rows ({error})")


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)
