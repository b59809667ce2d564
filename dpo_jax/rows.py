"""Rows of data files, whatever they hold: where a bad one stands and why, lines of JSON, columns of numbers."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

FLOAT32_MAX = 3.4e38

OnBadRow = Literal["error", "skip"]
Record = tuple[str, int, Any]  # file, number, and either a row or the RowError that stands in its place


class RowError(ValueError):
    """A bad row: the file, its number there (1 for the first line) and the reason."""

    def __init__(self, file: str, number: int, reason: str):
        super().__init__(f"{file}, row {number}: {reason}")
        self.file, self.number, self.reason = file, number, reason

    def __reduce__(self):  # the default calls __init__ with the message alone, so that no worker could send the error
        return RowError, (self.file, self.number, self.reason)


class SkippedRow(NamedTuple):
    """A bad row that was left out."""

    file: str
    number: int
    reason: str


class Reason(Exception):
    """Why a row is bad; whoever parses the row adds where it stands."""


def json_records(path: Path) -> Iterator[Record]:
    """One record per line that is not blank, of a plain or `.gz` file; what cannot be read is a RowError in its place.

    Raises:
      OSError: a file that is missing or may not be read.
    """
    file, number = str(path), 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield file, number, parse_json(line, file, number)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            reason = f"the gzip stream is broken or cut off here ({error}); rows after this point are lost"
            yield file, number + 1, RowError(file, number + 1, reason)


def parse_json(line: bytes, file: str, number: int) -> Any:
    """The value of one line, or the RowError that says why it has none."""
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        reason = f"expected UTF-8, but byte {error.start} of the line is 0x{line[error.start]:02x}"
    except (ValueError, RecursionError) as error:
        reason = f"expected one JSON object on this line ({error})"
    return RowError(file, number, reason)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the key {', '.join(map(repr, twice))} stands there twice")
    return found


def require_text(name: str, value: Any) -> None:
    """Refuse what is not text that UTF-8 can hold.

    Raises:
      Reason: another type, or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise Reason(f"{name} should be text, got {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise Reason(f"{name} holds half of a surrogate pair, which is no text") from None


def is_numeric(value: Any) -> bool:
    """A number, or a list that is not empty of numbers or such lists."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(is_numeric, value))
    return isinstance(value, (bool, int, float))


def numeric_column(name: str, value: Any) -> Any:
    """The value as it is, if all of its numbers are finite and fit a float32.

    Raises:
      Reason: a number that is not finite or too large.
    """
    for number in _flat(value):
        if not abs(number) <= FLOAT32_MAX:  # also true of nan
            what = number if isinstance(number, float) else "a huge integer"
            raise Reason(f"column {name!r} holds {what}; expected finite numbers")
    return value


def _flat(value: Any) -> Iterator[bool | int | float]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def kind_of(value: Any) -> str:
    """What a value is, in a reader's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "an empty list" if value == [] else names.get(type(value), type(value).__name__)
