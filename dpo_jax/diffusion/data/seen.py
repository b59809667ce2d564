"""What decoding found, kept on disk: a run that starts again looks at the times of files and decodes nothing.

A record is a folder of parts, JSON files named by the key of their bytes: key of a place -> height, width and content
key of its image, or the reason why it is none. The key of a place holds its file's size and time of change, so that a
file that was changed is not known. Parts appear whole or not at all. A broken one is removed: its images are decoded
again. Several processes may write at the same time.
"""

import json
import os
import uuid
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import PIL

from dpo_jax.diffusion.data.cache import content_key
from dpo_jax.diffusion.data.places import (
    FileBytes,
    ImageError,
    MemoryBytes,
    MemoryImage,
    ParquetBytes,
    Place,
    names_file,
)

_PART = 4096  # images; what a job that is killed has to decode again, and files on disk are few
_FORMAT = 1


class SeenImage(NamedTuple):
    """An image that was decoded once: its height and width, and the `content_key` of its bytes."""

    size: tuple[int, int]
    key: str


Found = SeenImage | str  # the reason of a refusal


class SeenRecord:
    """What was found at places of files, in a folder that is made when there is something to write.

    Attributes:
      broken: parts that could not be read.
    """

    def __init__(self, folder: str | Path, *, on_mode: str, max_pixels: int):
        self.folder, self.broken = Path(folder), []
        # Another Pillow may read what an older one refused.
        self._decoder = (_FORMAT, PIL.__version__, on_mode, max_pixels)
        self._found: dict[str, Found] = {}
        self._fresh: dict[str, Found] = {}
        self._identities: dict[str, tuple[str, int, int]] = {}
        self._lock = Lock()
        for path in sorted(self.folder.glob("*.json")):
            try:
                self._found |= _read(path)
            except OSError:
                self.broken.append(path)
            except (ValueError, TypeError):  # nothing can ever read it
                self.broken.append(path)
                path.unlink(missing_ok=True)

    def key(self, place: Place) -> str | None:
        """Key of a place as its file is now, or None for what is not kept: images in memory, files that are missing."""
        if isinstance(place, (MemoryBytes, MemoryImage)):
            return None
        try:
            file = self._identity(place)
        except OSError:
            return None
        if isinstance(place, FileBytes):
            return content_key(*self._decoder, *file, place.offset, -1 if place.size is None else place.size)
        return content_key(*self._decoder, *file, place.group, place.row, place.column)

    def _identity(self, place: FileBytes | ParquetBytes) -> tuple[str, int, int]:
        """Path, size and time of change; of a file with many images as they were at the first look."""
        if place.file in self._identities:
            return self._identities[place.file]
        stat = os.stat(place.file)
        identity = (os.path.abspath(place.file), stat.st_size, stat.st_mtime_ns)
        if isinstance(place, ParquetBytes) or place.size is not None:
            self._identities[place.file] = identity
        return identity

    def find(self, key: str | None) -> Found | None:
        """What was found at the place of a key, or None if it is not known."""
        return None if key is None else self._found.get(key)

    def keep(self, key: str | None, place: Place, found: Found) -> None:
        """Remember what was found; the key is that of the place before it was read, in case it is changed meanwhile."""
        if key is None:
            return
        try:
            # The bytes behind a name in a cell may change while the Parquet file does not.
            if isinstance(place, ParquetBytes) and names_file(place):
                return
        except (OSError, ImageError):  # gone meanwhile
            return
        with self._lock:
            self._found[key] = self._fresh[key] = found
            full = len(self._fresh) >= _PART
        if full:
            self.write()

    def write(self) -> None:
        """Write what is new as a part of its own."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        if not fresh:
            return
        entries = {key: found if isinstance(found, str) else [*found.size, found.key] for key, found in fresh.items()}
        data = json.dumps(entries).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{content_key(data)}.json"
        beside = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        beside.write_bytes(data)
        beside.replace(path)


def _read(path: Path) -> dict[str, Found]:
    data = path.read_bytes()
    if content_key(data) != path.stem:
        raise ValueError(f"{path} is not as it was written")
    found: dict[str, Found] = {}
    for key, entry in json.loads(data).items():
        if isinstance(entry, str):
            found[key] = entry
        else:
            height, width, content = entry
            found[key] = SeenImage((height, width), content)
    return found
