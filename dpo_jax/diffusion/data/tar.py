"""Samples of tar files in the WebDataset form: places of images inside the file, captions and labels as values."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_jax.diffusion.data.places import FileBytes
from dpo_jax.rows import Record, RowError

IMAGE_ENDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
IMAGE_NAMES = ("image", "jpg", "chosen", "rejected", "image_0", "image_1", "jpg_0", "jpg_1")
TEXT_NAMES = ("caption", "prompt", "text")
MAX_VALUE_BYTES = 1 << 24  # of captions, labels and JSON, which are read at once
BLOCK = 512

_Member = tuple[str, FileBytes | str]  # the name after the first dot; the second is a reason why it cannot be read


def tar_records(path: Path) -> Iterator[Record]:
    """One record per sample; a member that cannot be used is a RowError in its sample's place.

    Raises:
      OSError: a file that is missing or may not be read.
    """
    file, number, sample = str(path), 0, None
    members: list[_Member] = []
    with path.open("rb") as opened:
        length = opened.seek(0, 2)
        for key, name, place in _members(opened, file, length):
            if key != sample and members:
                number += 1
                yield file, number, _row(opened, members, file, number)
                members = []
            if key is None:
                number += 1
                yield file, number, RowError(file, number, str(place))
                continue
            sample = key
            members.append((name, place))
        if members:
            number += 1
            yield file, number, _row(opened, members, file, number)


def _members(opened: Any, file: str, length: int) -> Iterator[tuple[str | None, str, FileBytes | str]]:
    """Key of the sample, name in the sample and place of every member; key None and the reason where the file ends."""
    end = 0
    try:
        opened.seek(0)
        with tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                if member.offset_data < max(end, BLOCK) or member.size < 0:
                    yield (
                        None,
                        "",
                        f"the member {member.name!r} has the impossible size {member.size}; the rest is lost",
                    )
                    return
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK if member.isreg() else member.offset_data
                if member.isdir():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, name = base.partition(".")
                place: FileBytes | str = FileBytes(file, member.offset_data, member.size)
                if not member.isreg() or member.issparse():
                    place = f"the member {member.name!r} is no plain file; expected no links and no sparse files"
                elif member.offset_data + member.size > length:
                    place = f"the file ends inside the member {member.name!r}; what follows is lost"
                yield f"{folder}/{stem}", name.lower(), place
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, OSError) as error:
        what = "broken or cut off here" if end else "no tar file, or a compressed one; give an uncompressed .tar"
        yield None, "", f"the file is {what} ({error}); samples after this point are lost"
        return
    # The reader stops without a word at a header it cannot read, at the end mark of a first archive, and where the file
    # ends between two members.
    rest = _first_used_byte(opened, end, length)
    if rest is not None:
        reason = f"at byte {rest} the archive goes on with what cannot be read (a broken header, or a second archive)"
        yield None, "", f"{reason}; samples after this point are lost"
    elif length < end + 2 * BLOCK:
        yield None, "", "the file has no end mark (1024 zero bytes): it was cut off, and what followed is lost"


def _first_used_byte(opened: Any, start: int, length: int) -> int | None:
    """Position of the first byte that is not zero from `start` on."""
    opened.seek(start)
    while start < length:
        chunk = opened.read(1 << 20)
        if not chunk:
            return None
        if stripped := chunk.lstrip(b"\0"):
            return start + len(chunk) - len(stripped)
        start += len(chunk)
    return None


def _row(opened: Any, members: list[_Member], file: str, number: int) -> dict[str, Any] | RowError:
    """The row of a sample's members."""
    row: dict[str, Any] = {}
    for name, place in members:
        stem, _, end = name.rpartition(".")
        known = end in IMAGE_ENDS or name in (*IMAGE_NAMES, *TEXT_NAMES, "json", "txt") or name.startswith("label")
        if isinstance(place, str):
            if known or not name:
                return RowError(file, number, place)
            continue
        if end in IMAGE_ENDS or name in IMAGE_NAMES:
            values: Any = {(stem or "image") if end in IMAGE_ENDS else name: place}
        elif known:
            values = _values(opened, name, place)
            if isinstance(values, str):
                return RowError(file, number, f"the member .{name}: {values}")
        else:
            continue
        if repeated := sorted(row.keys() & values.keys()):
            return RowError(file, number, f"the sample has {', '.join(repeated)} twice")
        row.update(values)
    return row


def _values(opened: Any, name: str, place: FileBytes) -> dict[str, Any] | str:
    """Keys of the row that a member holds, or the reason why it has none."""
    if (place.size or 0) > MAX_VALUE_BYTES:
        return f"{place.size} bytes; at most {MAX_VALUE_BYTES} are read"
    opened.seek(place.offset)
    try:
        text = opened.read(place.size).decode("utf-8-sig")
        if name == "txt":
            return {"caption": text.strip()}
        if name in TEXT_NAMES:
            return {name: text.strip()}
        value = json.loads(text)
    except UnicodeDecodeError as error:
        return f"expected UTF-8, but byte {error.start} is wrong"
    except (ValueError, RecursionError) as error:
        return f"expected JSON ({error})"
    if name != "json":
        return {name: value}
    return value if isinstance(value, dict) else "expected one JSON object"
