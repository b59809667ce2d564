"""Arrays that are made once and kept on disk by the content they were made of: latents of images, states of texts.

A cache is a folder of safetensors files; a tensor `KEY/NAME` is one array of one entry. Files appear whole or not at
all, so a job that is killed goes on with what is missing. Several processes may write at the same time.
"""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

Entry = Mapping[str, np.ndarray]
_OPEN_FILES = 64


def content_key(*parts: bytes | str | int | float | Sequence[int]) -> str:
    """Key of everything that an entry is made of, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class Cache(Mapping[str, dict[str, np.ndarray]]):
    """Entries of a folder by key; arrays are read when they are asked for.

    Attributes:
      broken: files that could not be read at the last look; their entries are missing and will be made again.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.broken = Path(folder), []
        self.folder.mkdir(parents=True, exist_ok=True)
        self._names: dict[str, dict[str, Path]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look at the folder again, for what other processes wrote."""
        self.broken = []
        known = {path for names in self._names.values() for path in names.values()}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in known:
                continue
            try:
                with safe_open(path, framework="numpy") as file:
                    for name in file.keys():  # noqa: SIM118
                        key, _, array = name.partition("/")
                        self._names.setdefault(key, {})[array] = path
            except Exception:  # safetensors raises a type of its own
                self.broken.append(path)

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        return {name: _file(path).get_tensor(f"{key}/{name}") for name, path in self._names[key].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def write(self, entries: Mapping[str, Entry]) -> None:
        """Add entries in a file of their own."""
        if not entries:
            return
        path = self.folder / f"{content_key(*sorted(entries))}.safetensors"
        # Two processes may write the same entries at the same time.
        beside = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        tensors = {
            f"{key}/{name}": np.ascontiguousarray(x) for key, entry in entries.items() for name, x in entry.items()
        }
        save_file(tensors, beside)
        beside.replace(path)
        _file.cache_clear()  # a broken file of this name may still be open
        for key, entry in entries.items():
            self._names[key] = dict.fromkeys(entry, path)


@lru_cache(maxsize=_OPEN_FILES)
def _file(path: Path) -> Any:
    return safe_open(path, framework="numpy")


def fill(
    cache: Cache,
    keys: Sequence[str],
    make: Callable[[list[int]], Sequence[Entry]],
    *,
    together: int,
    there: Sequence[bool] | None = None,
    host: int = 0,
    hosts: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Make the entries that a cache lacks, some at a time; the number that were made.

    Each of several processes makes and writes its share.

    Args:
      keys: of all entries that are wanted; repeated ones are made once.
      make: `make(places)` gives the entries of some places in keys; all processes call it equally often and with
        equally many places, the last of which are repeated where there are too few.
      together: entries of one call, over all processes.
      there: which of the keys are not missing, the same on all processes; by default what this one sees.
      host, hosts: this process and their number.
      progress: called with the number of entries made and missing.

    Raises:
      ValueError: `together` is not a multiple of the number of processes.
    """
    if together % hosts:
        raise ValueError(f"{together} entries at a time do not fall evenly on {hosts} processes")
    there = [key in cache for key in keys] if there is None else there
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    missing = sorted(place for place in first.values() if not there[place])
    share = together // hosts
    for start in range(0, len(missing), together):
        places = missing[start : start + together]
        padded = places + [places[-1]] * (together - len(places))
        made = make(padded[host * share : (host + 1) * share])
        cache.write({keys[place]: entry for place, entry in zip(places[host * share :], made)})
        if progress is not None:
            progress(min(start + together, len(missing)), len(missing))
    return len(missing)
