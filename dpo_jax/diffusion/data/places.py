"""Where the bytes of an image are: rows stay small, and an image is read when it is wanted."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

MAX_IMAGE_BYTES = 1 << 28  # an encoded image of 256 MiB; more is a mistake or an attack


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason alone."""


@dataclass(frozen=True)
class FileBytes:
    """A whole file, or `size` bytes of it from `offset` on (a member of a tar file)."""

    file: str
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True)
class ParquetBytes:
    """A cell of a Parquet file: bytes, or a struct of `bytes` and `path`; `row` counts inside the row group from 0."""

    file: str
    group: int
    row: int
    column: str


@dataclass(frozen=True)
class MemoryBytes:
    """An encoded image in memory."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, eq=False)
class MemoryImage:
    """A decoded image in memory."""

    image: Image.Image


Place = FileBytes | ParquetBytes | MemoryBytes | MemoryImage


def read_bytes(place: FileBytes | ParquetBytes | MemoryBytes) -> bytes:
    """The encoded image.

    Cells of Parquet files come with the whole column of their row group; the last few such columns are kept, so read
    rows in the order of the file.

    Raises:
      ImageError: nothing there, more than MAX_IMAGE_BYTES, or a file that cannot be read.
    """
    try:
        match place:
            case FileBytes():
                data = _file_bytes(place)
            case ParquetBytes():
                data = _parquet_bytes(place)
            case MemoryBytes():
                data = place.data
    except OSError as error:
        raise ImageError(f"the image cannot be read ({error})") from None
    if not data:
        raise ImageError("the image has no bytes")
    return data


def _file_bytes(place: FileBytes) -> bytes:
    with open(place.file, "rb") as file:
        size = place.size if place.size is not None else file.seek(0, 2)
        if size > MAX_IMAGE_BYTES:
            raise ImageError(f"the image takes {size} bytes; at most {MAX_IMAGE_BYTES} are read")
        file.seek(place.offset)
        data = file.read(size)
    if len(data) < size:
        raise ImageError(f"{place.file} ends after {len(data)} of the image's {size} bytes")
    return data


def _parquet_bytes(place: ParquetBytes) -> bytes:
    stat = Path(place.file).stat()
    cells = _column(place.file, stat.st_mtime_ns, stat.st_size, place.group, place.column)
    if place.row >= len(cells):
        raise ImageError(f"row group {place.group} of {place.file} has only {len(cells)} rows; was the file changed?")
    cell = cells[place.row]
    if _length(cell) > MAX_IMAGE_BYTES:
        raise ImageError(f"the image takes {_length(cell)} bytes; at most {MAX_IMAGE_BYTES} are read")
    value = cell.as_py()
    if isinstance(value, dict):
        path = value.get("path")
        if value.get("bytes") is None and path:
            return _file_bytes(FileBytes(str(Path(place.file).parent / path)))
        value = value.get("bytes")
    if value is None:
        raise ImageError("the image is missing (null)")
    return value


def names_file(place: ParquetBytes) -> bool:
    """Whether a cell names a file instead of holding bytes; OSError and ImageError as `read_bytes`."""
    from pyarrow import types

    stat = Path(place.file).stat()
    cells = _column(place.file, stat.st_mtime_ns, stat.st_size, place.group, place.column)
    return types.is_struct(cells.type) and _length(cells[place.row]) == 0


def _length(cell: Any) -> int:
    """Bytes of a binary cell, or of the `bytes` of a struct, before they are copied."""
    from pyarrow import types

    if types.is_struct(cell.type):
        cell = cell["bytes"] if cell.is_valid else None
    if cell is None or not cell.is_valid:
        return 0
    return cell.as_buffer().size


@lru_cache(maxsize=4)  # both images of the current and of the next row group
def _column(file: str, changed: int, size: int, group: int, column: str) -> Any:
    """A column of a row group; `changed` and `size` of the file keep the cache from going stale."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as opened:
            return opened.read_row_group(group, columns=[column]).column(column)
    except (ArrowException, KeyError) as error:
        raise ImageError(f"row group {group} of {file} cannot be read ({error})") from None
