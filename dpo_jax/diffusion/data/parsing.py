"""One row of images: which form it has, where its images are, its captions and columns, and why a bad one is none.

Forms of a row, each a plain mapping with its caption under `caption`, `prompt` or `text`:

- `{"chosen", "rejected"}`: a pair in order.
- `{"image_0", "image_1"}` or `{"jpg_0", "jpg_1"}` (Pick-a-Pic v2): a pair, and who won: `label_0` is 1 if the first
  image did, 0 if the second, 0.5 for a tie; or `label` is the index of the winner, 0 or 1. Numbers `NAME_0` and
  `NAME_1` become the columns `chosen_NAME` and `rejected_NAME`; `columns` has a table of published names.
- `{"image", "rejected_caption"}`: one image with its caption (or `chosen_caption`) and a wrong one, a pair of the same
  image twice.
- `{"image"}` (or `jpg`): one image; its `label`, true or false, says whether it is liked.
- `{"images": [...]}`: a list, best first; `scores` has a number per image.
- `{"entity", "generated"}`: a reference image and what a personalised model made of it.
- `{"chosen_frames": [...], "rejected_frames": [...]}`: a pair of videos with as many frames.

The images of a pair may have captions of their own, `chosen_caption` and `rejected_caption`, or `caption_0` and
`caption_1` in the order of the images; they go before a caption of the row.

An image is a path relative to the file's folder (the key may then end in `_file_name`, or be `file_name` for a single
image), bytes, `{"bytes", "path"}`, a Pillow image or an array uint8 [H, W, 3]. Rows keep where the bytes are; images
are decoded in `decoding`. Further keys that hold numbers or lists of numbers are columns, and other further keys are
passed over; a row whose keys say two things at once is bad.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from dpo_jax.diffusion.data import columns as made_of
from dpo_jax.diffusion.data.places import FileBytes, MemoryBytes, MemoryImage, ParquetBytes, Place
from dpo_jax.rows import Reason, RowError, kind_of, require_text

CAPTION_KEYS = ("caption", "prompt", "text")
CAPTION_PAIRS = (("chosen_caption", "rejected_caption"), ("caption_0", "caption_1"))
ORDERED_KEYS = ("chosen", "rejected")
VIDEO_KEYS = ("chosen_frames", "rejected_frames")
PATCH_KEYS = ("entity", "generated")
PAIR_KEYS = (ORDERED_KEYS, ("image_0", "image_1"), ("jpg_0", "jpg_1"))
LIST_KEYS = ("images",)
SINGLE_KEYS = ("image", "jpg", "image_file_name", "file_name")

Form = Literal["pairs", "singles", "lists", "mismatched", "experts", "patches"]
_FORMS: dict[tuple[str, ...], Form] = {
    VIDEO_KEYS: "pairs",
    PATCH_KEYS: "patches",
    **dict.fromkeys(PAIR_KEYS, "pairs"),
    LIST_KEYS: "lists",
    SINGLE_KEYS: "singles",
}


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


def parse_row(row: Any, *, file: str = "row", number: int = 1, folder: Path = Path()) -> ImageRow:
    """Canonical form of one row; `file` and `number` go into the error, paths of images start from `folder`.

    Raises:
      RowError: a missing key, a wrong type, a label that is none, an image that is missing, empty or twice there, keys
        that contradict each other.
    """
    try:
        return _parsed(row, file, number, folder)
    except Reason as reason:
        raise RowError(file, number, str(reason)) from None
    except RecursionError:
        raise RowError(file, number, "its lists are nested too deeply") from None


def _parsed(row: Any, file: str, number: int, folder: Path) -> ImageRow:
    if not isinstance(row, Mapping):
        raise Reason(f"expected an object with a caption and images, got {kind_of(row)}")
    if strange := [key for key in row if not isinstance(key, str)]:
        raise Reason(f"the key {strange[0]!r} is {kind_of(strange[0])}; expected names as keys")
    row = {key: value for key, value in row.items() if value is not None}  # Parquet fills absent keys
    caption = _caption(row)
    found = _images(row)
    form, places = found.form, tuple(_place(name, value, folder) for name, value in found.values.items())
    own = _captions(row, form)
    if form == "singles" and own:
        form, places = "pairs", places * 2
    frames = len(places) // 2 if found.names == VIDEO_KEYS else 1
    # Frames of a video may repeat, and one image under two captions stands twice in its pair.
    if frames == 1 and len(found.values) > 1 and any(place in places[:i] for i, place in enumerate(places)):
        raise Reason(f"the images {' and '.join(found.values)} are not all different")
    numbers = made_of.numbers_of(
        row, (*CAPTION_KEYS, *(name for names in CAPTION_PAIRS for name in names), *found.keys)
    )
    if form == "pairs" or any(name in numbers for name in ("label", "labels")):
        made_of.require_label(row)
    if form == "lists":
        columns = made_of.columns_of_list(numbers, len(places))
    elif form == "singles":
        columns = made_of.columns_of_single(numbers)
    elif form == "patches":
        columns = made_of.columns_of_patches(numbers)
    elif found.names in (ORDERED_KEYS, VIDEO_KEYS, SINGLE_KEYS):
        sides = ("the image", "rejected_caption") if found.names == SINGLE_KEYS else found.keys
        columns = made_of.columns_in_order(numbers, " and ".join(sides))
    else:
        first = made_of.first_wins(numbers)
        columns = made_of.columns_by_label(numbers, first)
        if first == 0:
            places, own = places[::-1], own if "chosen_caption" in row else own[::-1]
    return ImageRow(caption, places, columns, file, number, form, own, frames)


def _caption(row: Mapping[str, Any]) -> str:
    """The caption of the row, or the first of those of its images."""
    given = [key for key in CAPTION_KEYS if key in row]
    given = given or [names[0] for names in CAPTION_PAIRS if names[0] in row][:1]
    if not given:
        raise Reason(f"no caption among the keys {sorted(row)}; expected one of {', '.join(CAPTION_KEYS)}")
    for key in given:
        require_text(key, row[key])
        if row[key] != row[given[0]]:
            raise Reason(f"{given[0]} and {key} are different captions; leave one of them out")
    return row[given[0]]


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
    for name in CAPTION_KEYS:
        if row.get(name, row[first]) != row[first]:
            raise Reason(f"{first} and {name} of the one image are different captions; leave one of them out")
    return row[first], row["rejected_caption"]


_AS_FILE = "_file_name"


class _Images(NamedTuple):
    """Form of a row, the names that tell it, the keys that are there for them, and the images by name."""

    form: Form
    names: tuple[str, ...]
    keys: tuple[str, ...]
    values: dict[str, Any]


def _images(row: Mapping[str, Any]) -> _Images:
    """The images of a row, which says one form only."""
    found = {names: keys for names in _FORMS if (keys := _keys(row, names))}
    if PATCH_KEYS in found and len(found) > 1 and len(found[PATCH_KEYS]) == 1:
        del found[PATCH_KEYS]  # a word of its own that other rows may use
    if not found:
        forms = "chosen + rejected, image_0 + image_1, jpg_0 + jpg_1, images, or image"
        raise Reason(f"no images among the keys {sorted(row)}; expected {forms}")
    (names, keys), *more = found.items()
    if more:
        raise Reason(f"there is {keys[0]} beside {more[0][1][0]}; expected images of one form")
    if len(keys) > len(names) or (len(keys) > 1 and _FORMS[names] in ("singles", "lists")):
        raise Reason(f"there are {' and '.join(keys)}; expected one key for an image")
    if names == VIDEO_KEYS:
        return _Images("pairs", names, names, _frames(row))
    if names == LIST_KEYS:
        if not isinstance(row["images"], (list, tuple)) or not row["images"]:
            raise Reason(f"images should be a list of at least one image, got {kind_of(row['images'])}")
        return _Images("lists", names, names, {f"images[{i}]": value for i, value in enumerate(row["images"])})
    if names == SINGLE_KEYS:
        return _Images("singles", names, keys, {key: row[key] for key in keys})
    given = {key.removesuffix(_AS_FILE): key for key in keys}
    if missing := [name for name in names if name not in given]:
        raise Reason(f"there is {' and '.join(given)}, but no {missing[0]}; expected both images of a pair")
    return _Images(_FORMS[names], names, keys, {name: row[key] for name, key in given.items()})


def _keys(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a row's keys that name images of one form."""
    as_file = (name + _AS_FILE for name in names if _FORMS[names] in ("pairs", "patches") and names != VIDEO_KEYS)
    return tuple(key for key in (*names, *as_file) if key in row)


def _frames(row: Mapping[str, Any]) -> dict[str, Any]:
    """The frames of two videos by name."""
    videos = [row.get(name) for name in VIDEO_KEYS]
    counts = [len(video) if isinstance(video, (list, tuple)) else 0 for video in videos]
    if not counts[0] or counts[0] != counts[1]:
        raise Reason(f"{' and '.join(VIDEO_KEYS)} have {counts[0]} and {counts[1]} frames; expected as many in both")
    return {f"{name}[{i}]": frame for name, video in zip(VIDEO_KEYS, videos) for i, frame in enumerate(video or ())}


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
