"""Image rows: read a folder, JSONL, Parquet or tar file, check every row, say exactly where a bad one stands.

Forms of a row, each a plain mapping with its caption under `caption`, `prompt` or `text`:

- `{"chosen", "rejected"}`: a pair in order.
- `{"image_0", "image_1"}` or `{"jpg_0", "jpg_1"}` (Pick-a-Pic v2): a pair, and who won: `label_0` is 1 if the first
  image did, 0 if the second, 0.5 for a tie; or `label` is the index of the winner, 0 or 1. Numbers `NAME_0` and
  `NAME_1` become the columns `chosen_NAME` and `rejected_NAME`.
- `{"image", "rejected_caption"}`: one image with its caption (or `chosen_caption`) and a wrong one, a pair of the same
  image twice.
- `{"image"}` (or `jpg`): one image; its `label`, true or false, says whether it is liked.
- `{"images": [...]}`: a list, best first; `scores` has a number per image.
- `{"entity", "generated"}`: a reference image and what a personalised model made of it.
- `{"chosen_frames": [...], "rejected_frames": [...]}`: a pair of videos with as many frames.

The images of a pair may have captions of their own, `chosen_caption` and `rejected_caption`, or `caption_0` and
`caption_1` in the order of the images.

An image is a path relative to the file's folder (the key may then end in `_file_name`, or be `file_name` for a single
image), bytes, `{"bytes", "path"}`, a Pillow image or an array uint8 [H, W, 3]. Rows keep where the bytes are; images
are decoded in `decoding`. Further keys that hold numbers or lists of numbers are columns.

Folders hold `metadata.jsonl`. In tar files of the WebDataset form the members of one sample stand together and share
their name up to the first dot: `7.json` holds keys of the row, `7.txt` the caption, `7.jpg` the image, `7.chosen.png`
and `7.jpg_0` an image of a pair, `7.caption` or `7.label_0` a value.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from dpo_jax.diffusion.data.places import FileBytes, MemoryBytes, MemoryImage, ParquetBytes, Place
from dpo_jax.rows import (
    OnBadRow,
    Reason,
    Record,
    RowError,
    SkippedRow,
    is_numeric,
    json_records,
    kind_of,
    numeric_column,
    require_text,
)

CAPTION_KEYS = ("caption", "prompt", "text")
CAPTION_PAIRS = (("chosen_caption", "rejected_caption"), ("caption_0", "caption_1"))
PAIR_KEYS = (("chosen", "rejected"), ("image_0", "image_1"), ("jpg_0", "jpg_1"))
SINGLE_KEYS = ("image", "jpg")
VIDEO_KEYS = ("chosen_frames", "rejected_frames")
# What Pick-a-Pic says of its rows besides; none of it is a number to learn from.
BOOKKEEPING = {"has_label", "are_different", "ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__"}

Ties = Literal["drop", "keep"]
Form = Literal["pairs", "singles", "lists", "mismatched", "experts", "patches"]


@dataclass(frozen=True)
class ImageRow:
    """A caption and its K images.

    Attributes:
      caption: text, which may be empty.
      images: where the K images are: chosen and rejected; one; or a list, best first.
      columns: name -> number or (nested) list of numbers. Kept ties make a column `tie` of 0 and 1.
      file, number: where the row was read; the number counts lines, rows or samples from 1.
      form: what the images are.
      captions: of each image, where they differ; () where all have the one caption.
      frames: of each image, which is then a video; `images` has the frames of the first one, then of the next.
    """

    caption: str
    images: tuple[Place, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    number: int = 0
    form: Form = "pairs"
    captions: tuple[str, ...] = ()
    frames: int = 1


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


def parse_row(row: Any, *, file: str = "row", number: int = 1, folder: Path = Path()) -> ImageRow:
    """Canonical form of one row; `file` and `number` go into the error, paths of images start from `folder`.

    Raises:
      RowError: a missing key, a wrong type, a label that is none, an image that is missing, empty or twice there.
    """
    try:
        if not isinstance(row, Mapping):
            raise Reason(f"expected an object with a caption and images, got {kind_of(row)}")
        row = {str(key): value for key, value in row.items() if value is not None}  # Parquet fills absent keys
        caption_key = next((key for key in CAPTION_KEYS if key in row), None)
        if caption_key is None:
            caption_key = next((key for key in ("chosen_caption", "caption_0") if key in row), None)
        if caption_key is None:
            raise Reason(f"no caption among the keys {sorted(row)}; expected one of {', '.join(CAPTION_KEYS)}")
        require_text(caption_key, row[caption_key])
        form, used, values = _images(row)
        places = tuple(_place(name, value, folder) for name, value in values.items())
        own = _captions(row, form)
        if form == "singles" and own:
            form, places = "pairs", places * 2
        frames = len(places) // 2 if used == VIDEO_KEYS else 1
        # Frames of a video may repeat, and one image under two captions stands twice in its pair.
        if frames == 1 and len(values) > 1 and any(place in places[:i] for i, place in enumerate(places)):
            raise Reason(f"the images {' and '.join(values)} are not all different")
        numbers = {k: numeric_column(k, v) for k, v in row.items() if k not in (caption_key, *used) and is_numeric(v)}
        numbers = {key: value for key, value in numbers.items() if key not in BOOKKEEPING}
        if form == "pairs" and not next(iter(values)).startswith("chosen") and len(values) == 2:
            if row.get("has_label") is False:
                raise Reason("has_label is false; expected a pair with a label")
            before = places
            places, columns = _ordered(places, numbers)
            own = own if places == before or "chosen_caption" in row else own[::-1]
        else:
            columns = _columns(form, numbers, len(places))
    except Reason as reason:
        raise RowError(file, number, str(reason)) from None
    except RecursionError:
        raise RowError(file, number, "its lists are nested too deeply") from None
    return ImageRow(row[caption_key], places, columns, file, number, form, own, frames)


def _captions(row: Mapping[str, Any], form: Form) -> tuple[str, ...]:
    """Captions of the images one by one, chosen first or in the order of the row; () if the row has none."""
    given = [name for names in CAPTION_PAIRS for name in names if name in row]
    if not given:
        return ()
    if form == "singles" and given in (["rejected_caption"], ["chosen_caption", "rejected_caption"]):
        return _of_one_image(row)
    if form != "pairs":
        raise Reason(f"{given[0]} is a caption of one side of a pair, and the row is one of {form}")
    names = next(names for names in CAPTION_PAIRS if given[0] in names)
    if given != list(names):
        wrong = f"{given[0]} alone" if len(given) == 1 else " and ".join(given)
        raise Reason(f"there is {wrong}; expected {' and '.join(names)}")
    for name in names:
        require_text(name, row[name])
    return tuple(row[name] for name in names)


def _of_one_image(row: Mapping[str, Any]) -> tuple[str, str]:
    """The right caption and the wrong one."""
    first = next(key for key in ("chosen_caption", *CAPTION_KEYS) if key in row)
    for name in (first, "rejected_caption"):
        require_text(name, row[name])
    if row[first] == row["rejected_caption"]:
        raise Reason(f"{first} and rejected_caption of the one image are the same text")
    if "label" in row:
        raise Reason("there is label beside rejected_caption, which says already what is liked; leave one of them out")
    return row[first], row["rejected_caption"]


def _images(row: Mapping[str, Any]) -> tuple[Form, tuple[str, ...], dict[str, Any]]:
    """Form of a row, the keys that were used, and its images by name."""
    if "chosen_frames" in row or "rejected_frames" in row:
        return "pairs", VIDEO_KEYS, _frames(row)
    if "entity" in row and "generated" in row:
        return "patches", ("entity", "generated"), {name: row[name] for name in ("entity", "generated")}
    for names in PAIR_KEYS:
        given = {name: key for name in names for key in (name, f"{name}_file_name") if key in row}
        if given:
            missing = [name for name in names if name not in given]
            if missing:
                raise Reason(f"there is {' and '.join(given)}, but no {missing[0]}; expected both images of a pair")
            return "pairs", tuple(given.values()), {name: row[key] for name, key in given.items()}
    if "images" in row:
        if not isinstance(row["images"], (list, tuple)) or not row["images"]:
            raise Reason(f"images should be a list of at least one image, got {kind_of(row['images'])}")
        return "lists", ("images",), {f"images[{i}]": value for i, value in enumerate(row["images"])}
    single = next((key for key in (*SINGLE_KEYS, "image_file_name", "file_name") if key in row), None)
    if single is None:
        forms = "chosen + rejected, image_0 + image_1, jpg_0 + jpg_1, images, or image"
        raise Reason(f"no images among the keys {sorted(row)}; expected {forms}")
    return "singles", (single,), {single: row[single]}


def _frames(row: Mapping[str, Any]) -> dict[str, Any]:
    """The frames of two videos by name."""
    videos = [row.get(name) for name in VIDEO_KEYS]
    counts = [len(video) if isinstance(video, (list, tuple)) else 0 for video in videos]
    if not counts[0] or counts[0] != counts[1]:
        raise Reason(f"{' and '.join(VIDEO_KEYS)} have {counts[0]} and {counts[1]} frames; expected as many in both")
    return {f"{name}[{i}]": frame for name, video in zip(VIDEO_KEYS, videos) for i, frame in enumerate(video or ())}


def _ordered(places: tuple[Place, ...], numbers: dict[str, Any]) -> tuple[tuple[Place, ...], dict[str, Any]]:
    """A labelled pair and its numbers with the winner first; a tie stays in its order."""
    first = _first_wins(numbers)
    sides = ("rejected", "chosen") if first == 0 else ("chosen", "rejected")
    columns: dict[str, Any] = {"tie": int(first == 0.5)}
    for name, value in numbers.items():
        stem, end = name[:-2], name[-2:]
        if name in ("label", "label_0", "label_1"):
            continue
        if end in ("_0", "_1") and {f"{stem}_0", f"{stem}_1"} <= numbers.keys():
            name = f"{sides[int(end[1])]}_{stem}"
        columns[name] = value
    return (places[::-1] if first == 0 else places), columns


def _first_wins(numbers: Mapping[str, Any]) -> float:
    """1, 0 or, for a tie, 0.5."""
    if "label_0" not in numbers and "label_1" not in numbers:
        label = numbers.get("label")
        if label is None:
            raise Reason("a pair without a label; expected label_0 (1, 0 or 0.5) or label (index of the winner)")
        if isinstance(label, (list, tuple)) or label not in (0, 1, 0.5):
            raise Reason(f"label is {label!r}; expected the index of the winner, 0 or 1, or 0.5 for a tie")
        return 1 - label
    for name in ("label_0", "label_1"):
        if name in numbers and (isinstance(numbers[name], (list, tuple)) or numbers[name] not in (0, 1, 0.5)):
            raise Reason(f"{name} is {numbers[name]!r}; expected 1, 0 or, for a tie, 0.5")
    first = numbers.get("label_0", 1 - numbers.get("label_1", 0))
    if first + numbers.get("label_1", 1 - first) != 1:
        raise Reason(f"label_0 is {first!r} and label_1 is {numbers['label_1']!r}; expected a sum of 1")
    return first


def _columns(form: Form, numbers: dict[str, Any], count: int) -> dict[str, Any]:
    """What the names of known columns promise: labels are 0 or 1, a list has a score for each image."""
    if form == "singles" and "label" in numbers:
        if isinstance(numbers["label"], (list, tuple)) or numbers["label"] not in (0, 1):
            raise Reason(f"label is {numbers['label']!r}; expected true or false (1 or 0)")
        numbers = {("labels" if name == "label" else name): value for name, value in numbers.items()}
    scores = numbers.get("scores")
    if form == "lists" and scores is not None and (not isinstance(scores, (list, tuple)) or len(scores) != count):
        given = len(scores) if isinstance(scores, (list, tuple)) else "no list of"
        raise Reason(f"{given} scores for {count} images; expected one number for each")
    return numbers


def _place(name: str, value: Any, folder: Path) -> Place:
    """Where an image is; it must be there and not be empty."""
    if isinstance(value, (FileBytes, ParquetBytes)):
        if isinstance(value, FileBytes) and value.size == 0:
            raise Reason(f"{name} has no bytes")
        return value
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, Image.Image):
        return MemoryImage(value)
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3 or not value.size:
            raise Reason(f"{name} is an array {value.dtype} {list(value.shape)}; expected uint8 [H, W, 3]")
        return MemoryImage(Image.fromarray(value))
    if isinstance(value, (bytes, bytearray)):
        if not value:
            raise Reason(f"{name} has no bytes")
        return MemoryBytes(bytes(value))
    if not isinstance(value, str):
        raise Reason(f"{name} should be the path of an image, its bytes or an array, got {kind_of(value)}")
    return FileBytes(_existing(name, value, folder))


def _existing(name: str, value: str, folder: Path) -> str:
    require_text(name, value)
    if "://" in value:
        raise Reason(f"{name} is the address {value!r}; fetch the image first and give its path")
    path = folder / value
    try:
        size = os.stat(path).st_size if path.is_file() else None
    except (OSError, ValueError) as error:  # a path too long, with a zero byte, or that may not be read
        raise Reason(f"{name} is {value!r}, which cannot be read ({error})") from None
    if size is None:
        raise Reason(f"{name} is {value!r}, but {path} is no file")
    if size == 0:
        raise Reason(f"{name} is {value!r}, which has no bytes")
    return str(path)
