"""Images: bytes to RGB arrays, what cannot be used said clearly, resized and cropped into aspect buckets.

Only still images in common formats are opened; other decoders of Pillow (which may run foreign programs) are not
reached. Colour profiles are left aside: sRGB is assumed.
"""

import io
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from dpo_jax.diffusion.data.places import ImageError, MemoryImage, Place, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 1024 * 1024  # 192 MiB as RGB

OnMode = Literal["convert", "error"]


class Bucket(NamedTuple):
    """Size of all images of a batch."""

    height: int
    width: int


class Framing(NamedTuple):
    """How the K images of a row are cut to one bucket, which their sizes alone decide.

    Attributes:
      original_sizes: int32 [K, 2], height and width before resizing (after the rotation that EXIF asks for).
      crops: int32 [K, 2], top and left of the crop in the resized (and flipped, if so) image.
      flips: bool [K], turned left to right.
      bucket: H and W.
    """

    original_sizes: np.ndarray
    crops: np.ndarray
    flips: np.ndarray
    bucket: Bucket


class Prepared(NamedTuple):
    """The K images of a row in one bucket, and what SDXL is told of them.

    Attributes:
      images: float32 [K, H, W, 3] in [-1, 1].
      original_sizes: int32 [K, 2], height and width before resizing (after the rotation that EXIF asks for).
      crops: int32 [K, 2], top and left of the crop in the resized (and flipped, if so) image.
      bucket: H and W.
    """

    images: np.ndarray
    original_sizes: np.ndarray
    crops: np.ndarray
    bucket: Bucket


def decode(place: Place, *, on_mode: OnMode = "convert", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The image as uint8 [H, W, 3] RGB, rotated as its EXIF data asks.

    Args:
      place: where its bytes are.
      on_mode: of an image that is not plain 8-bit RGB or grey, "convert" makes RGB (palettes and CMYK by Pillow's
        rules, 16-bit grey divided by 257, transparency over white); "error" refuses it.
      max_pixels: larger images are refused before they are decoded.

    Raises:
      ImageError: bytes that are no image of FORMATS, are cut off or broken; an animation; too many or no pixels; a
        mode without a conversion, or any conversion if `on_mode` says so.
    """
    data = b"" if isinstance(place, MemoryImage) else read_bytes(place)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's own limit is one for all of the process
    try:
        if isinstance(place, MemoryImage):
            return _usable(place.image, data, on_mode, max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _usable(image, data, on_mode, max_pixels)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"a decompression bomb, or an image of more than {max_pixels} pixels (max_pixels)") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{len(data)} bytes that are no image of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders of broken files raise almost anything
        raise ImageError(f"the image is broken or cut off ({type(error).__name__}: {error})") from None


def _usable(image: Image.Image, data: bytes, on_mode: OnMode, max_pixels: int) -> np.ndarray:
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"the image has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ImageError(
            f"a decompression bomb, or too large: {width} x {height}, more than {max_pixels} pixels (max_pixels)"
        )
    # Photographs in the multi-picture format hold previews behind the picture itself.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(f"the {image.format} image has more than one frame; give a still image")
    sixteen = image.mode.startswith("I") or (image.format == "PNG" and data[24:25] == b"\x10")
    if on_mode == "error" and (image.mode not in ("RGB", "L") or sixteen or image.has_transparency_data):
        what = "16 bits" if sixteen else f"mode {image.mode}{' with transparency' * image.has_transparency_data}"
        raise ImageError(f"the image has {what}; expected 8-bit RGB or grey")
    image.load()
    return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if image.mode.startswith("I"):  # Pillow itself would clip 16-bit values at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"grey values from {grey.min()} to {grey.max()}; expected at most 16 bits")
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no agreed range; convert the image to 8 bits")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, colours)
    return np.array(image.convert("RGB"))


def make_buckets(area: int = 1024 * 1024, *, step: int = 64, max_ratio: float = 2.0) -> tuple[Bucket, ...]:
    """Sizes of at most `area` pixels whose sides are multiples of `step`, from tall to wide.

    Raises:
      ValueError: no size fits.
    """
    heights = range(step, area // step + 1, step)
    sizes = (Bucket(height, area // height // step * step) for height in heights)
    fitting = [size for size in sizes if size.width and max(size) <= max_ratio * min(size)]
    if not fitting:
        raise ValueError(f"no sizes of {area} pixels in steps of {step} with a ratio up to {max_ratio}; lower the step")
    return tuple(sorted(fitting, key=lambda size: size.width / size.height))


def nearest_bucket(sizes: Iterable[tuple[int, int]], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose ratio of sides is nearest to the (geometric) mean ratio of images of heights and widths."""
    wanted = np.mean([math.log(width / height) for height, width in sizes])
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - wanted))


def frame(
    sizes: Sequence[tuple[int, int]],
    buckets: Sequence[Bucket],
    *,
    random: np.random.Generator | None = None,
    flip: float = 0.0,
) -> Framing:
    """Where images of heights and widths are cut to cover the bucket that is nearest to all of them.

    Args:
      sizes: of the K images, which all go into one bucket.
      buckets: sizes to choose from.
      random: draws the place of the crops and the flips, for each image on its own; None crops the centre.
      flip: probability of a left-right flip; not for captions that tell left from right.

    Raises:
      ValueError: flips without `random`.
    """
    if flip and random is None:
        raise ValueError(f"flip is {flip}, but there is no random generator; give `random`")
    bucket = nearest_bucket(sizes, buckets)
    crops, flips = [], []
    for size in sizes:
        free = (covering - side for covering, side in zip(_covering(size, bucket), bucket))
        crops.append([n // 2 if random is None else int(random.integers(n + 1)) for n in free])
        flips.append(random is not None and random.random() < flip)
    return Framing(np.array(sizes, np.int32), np.array(crops, np.int32), np.array(flips, bool), bucket)


def cut(image: np.ndarray, framing: Framing, number: int) -> np.ndarray:
    """Image `number` of a row, uint8 [h, w, 3], as its framing says: float32 [H, W, 3] in [-1, 1].

    It is resized until it covers the bucket (bicubic, antialiased), and cropped to it.
    """
    height, width = image.shape[:2]
    bucket, (top, left), flipped = framing.bucket, map(int, framing.crops[number]), bool(framing.flips[number])
    tall, wide = _covering((height, width), bucket)
    start = wide - bucket.width - left if flipped else left
    # Only the part that is kept is resized: a line of pixels would otherwise become a huge image.
    box = (
        start * width / wide,
        top * height / tall,
        (start + bucket.width) * width / wide,
        (top + bucket.height) * height / tall,
    )
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    resized = Image.fromarray(image).resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(resized)
    return (pixels[:, ::-1] if flipped else pixels).astype(np.float32) / 127.5 - 1.0


def prepare(
    images: Sequence[np.ndarray],
    buckets: Sequence[Bucket],
    *,
    random: np.random.Generator | None = None,
    flip: float = 0.0,
) -> Prepared:
    """K images, uint8 [H, W, 3] of any sizes, framed and cut; the options are those of `frame`."""
    framing = frame([image.shape[:2] for image in images], buckets, random=random, flip=flip)
    cutouts = [cut(image, framing, number) for number, image in enumerate(images)]
    return Prepared(np.stack(cutouts), framing.original_sizes, framing.crops, framing.bucket)


def _covering(size: tuple[int, int], bucket: Bucket) -> tuple[int, int]:
    """Height and width of an image that was resized until it covers the bucket."""
    height, width = size
    scale = max(bucket.height / height, bucket.width / width)
    return max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))


def size_conditions(prepared: Prepared | Framing) -> np.ndarray:
    """SDXL's six numbers per image, float32 [K, 6]: original height and width, crop top and left, height and width.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2.
    """
    bucket = np.broadcast_to(np.array(prepared.bucket), prepared.crops.shape)
    return np.concatenate([prepared.original_sizes, prepared.crops, bucket], axis=1).astype(np.float32)
