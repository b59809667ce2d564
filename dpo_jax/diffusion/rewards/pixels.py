"""Images as CLIP's towers see them: resized, squared and normalised, on the host and exact.

`short_side_crop` is Pillow's bicubic resize of 8-bit values, so that scores are those of the official code. HPS resizes
in float and pads (`long_side_pad`): its padding is -mean / std after normalisation, not zero.
"""

import math

import numpy as np
from PIL import Image

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def normalised(image: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3] in [0, 1], less CLIP's mean over its standard deviation."""
    return (image.astype(np.float32) - MEAN) / STD


def short_side_crop(image: np.ndarray, size: int = 224, *, nearest_centre: bool = False) -> np.ndarray:
    """The centre of the image, whose short side becomes `size`; float32 [size, size, 3], normalised.

    Args:
      image: uint8 [H, W, 3].
      nearest_centre: an odd rest is split to the nearest even place, as torchvision does (OpenAI's own transform),
        not downwards, as transformers does.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    tall, wide = (int(size * side / short) for side in (height, width))
    resized = Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC)
    half = (lambda rest: round(rest / 2)) if nearest_centre else (lambda rest: rest // 2)
    top, left = half(tall - size), half(wide - size)
    cropped = np.asarray(resized)[top : top + size, left : left + size]
    return normalised(cropped.astype(np.float32) / 255)


def long_side_pad(image: np.ndarray, size: int = 224, *, antialias: bool = True) -> np.ndarray:
    """The whole image, whose long side becomes `size`, padded to a square; float32 [size, size, 3], normalised.

    Args:
      image: uint8 [H, W, 3].
      antialias: as torchvision resizes from 0.17 on; before it sampled four neighbours, and scores were others.
    """
    height, width = image.shape[:2]
    scale = size / max(height, width)
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    values = image.astype(np.float32) / 255
    if scale != 1:
        rows, columns = (bicubic_weights(n, m, antialias=antialias) for n, m in ((height, tall), (width, wide)))
        values = np.einsum("yh,hwc->ywc", rows, np.einsum("xw,hwc->hxc", columns, values, optimize=True), optimize=True)
    top, left = (size - tall) // 2, (size - wide) // 2
    square = np.zeros((size, size, 3), np.float32)
    square[top : top + tall, left : left + wide] = values
    return normalised(square)


def bicubic_weights(size: int, wanted: int, *, antialias: bool) -> np.ndarray:
    """How much each of `size` pixels counts in each of `wanted` ones, float32 [wanted, size]; rows sum to one.

    Antialiased: Keys' kernel (1981) with a = -1/2, as wide as the pixels that it covers, cut off at the border.
    Otherwise a = -3/4 at four neighbours, and pixels beyond the border repeat it.
    """
    ratio = size / wanted
    weights = np.zeros((wanted, size))
    for place in range(wanted):
        centre = (place + 0.5) * ratio
        if antialias:
            stretch = max(ratio, 1.0)
            first, last = int(max(centre - 2 * stretch + 0.5, 0)), int(min(centre + 2 * stretch + 0.5, size))
            taps = np.arange(first, last)
            values = _keys((taps + 0.5 - centre) / stretch, -0.5)
            weights[place, taps] = values / values.sum()
        else:
            corner = math.floor(centre - 0.5)
            taps = np.arange(corner - 1, corner + 3)
            np.add.at(weights[place], np.clip(taps, 0, size - 1), _keys(taps + 0.5 - centre, -0.75))
    return weights.astype(np.float32)


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
