"""The images of rows: all of them looked at before a run, those that are wanted loaded during it."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from dpo_jax.diffusion.data.cache import content_key
from dpo_jax.diffusion.data.images import MAX_PIXELS, OnMode, decode
from dpo_jax.diffusion.data.parsing import ImageRow
from dpo_jax.diffusion.data.places import ImageError, MemoryBytes, MemoryImage, Place, read_bytes
from dpo_jax.diffusion.data.seen import SeenImage, SeenRecord
from dpo_jax.rows import OnBadRow, RowError, SkippedRow

T = TypeVar("T")
THREADS = min(8, os.cpu_count() or 1)  # that decode images; Pillow leaves the interpreter free meanwhile


class ImagesChecked(NamedTuple):
    """Rows whose images can all be decoded, what was seen of each of their images, and the rows left out."""

    rows: list[ImageRow]
    images: list[tuple[SeenImage, ...]]
    skipped: list[SkippedRow]


def load_images(row: ImageRow, *, on_mode: OnMode = "convert", max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, ...]:
    """The K images of a row, uint8 [H, W, 3] RGB, of any sizes; the options are those of `images.decode`.

    Raises:
      RowError: an image that cannot be used.
    """
    return _of_images(row, partial(decode, on_mode=on_mode, max_pixels=max_pixels))


def load_image(row: ImageRow, number: int, *, on_mode: OnMode = "convert", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Image `number` of a row alone, as `load_images`."""
    return _of_images(row, partial(decode, on_mode=on_mode, max_pixels=max_pixels), [number])[0]


def _of_images(row: ImageRow, work: Callable[[Place], T], numbers: Sequence[int] | None = None) -> tuple[T, ...]:
    """What `work` makes of a row's images; errors say which image of which row."""
    made = []
    for number in range(len(row.images)) if numbers is None else numbers:
        try:
            made.append(work(row.images[number]))
        except ImageError as error:
            name = f"image {number}"
            if row.form == "pairs":
                video, place = divmod(number, row.frames)
                name = ("chosen", "rejected")[video] + (f" frame {place}" if row.frames > 1 else " image")
            raise RowError(row.file, row.number, f"{name}: {error}") from None
    return tuple(made)


def check_images(
    rows: Iterable[ImageRow],
    *,
    on_bad_row: OnBadRow = "error",
    on_mode: OnMode = "convert",
    max_pixels: int = MAX_PIXELS,
    record: SeenRecord | None = None,
) -> ImagesChecked:
    """Decode every image once, some at the same time, so that a bad one is found before a run and not during it.

    Args:
      rows: with K images each.
      on_bad_row: "error" raises at the first row with a bad image, "skip" lists it.
      on_mode, max_pixels: as in `images.decode`.
      record: of what was found before with the same options, whose images are not decoded; it grows.

    Raises:
      RowError: an image that cannot be used (only with "error").
    """

    def seen(place: Place) -> SeenImage:
        if isinstance(place, MemoryImage):
            image = decode(place, on_mode=on_mode, max_pixels=max_pixels)
            return SeenImage(image.shape[:2], content_key(image.shape, image.tobytes()))
        key = None if record is None else record.key(place)
        found = None if record is None else record.find(key)
        if found is None:
            data = read_bytes(place)  # a file that cannot be read now may be read later: not kept
            try:
                image = decode(MemoryBytes(data), on_mode=on_mode, max_pixels=max_pixels)
                found = SeenImage(image.shape[:2], content_key(data))
            except ImageError as error:
                if isinstance(error.__context__, MemoryError):
                    raise
                found = str(error)
            if record is not None:
                record.keep(key, place, found)
        if isinstance(found, str):
            raise ImageError(found)
        return found

    def look(row: ImageRow) -> tuple[ImageRow, tuple[SeenImage, ...] | RowError]:
        try:
            return row, _of_images(row, seen)
        except RowError as error:
            return row, error

    good: list[ImageRow] = []
    found: list[tuple[SeenImage, ...]] = []
    skipped: list[SkippedRow] = []
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for row, images in pool.map(look, rows):
                if not isinstance(images, RowError):
                    good.append(row)
                    found.append(images)
                elif on_bad_row == "error":
                    pool.shutdown(cancel_futures=True)
                    raise images
                else:
                    skipped.append(SkippedRow(images.file, images.number, images.reason))
    finally:
        if record is not None:
            record.write()
    return ImagesChecked(good, found, skipped)
