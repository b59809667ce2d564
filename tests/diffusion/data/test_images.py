"""Images: every mode to RGB, every bad image refused with its reason, buckets, crops and what SDXL is told."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dpo_jax.diffusion.data import images
from dpo_jax.diffusion.data.images import Bucket, decode, make_buckets, nearest_bucket, prepare, size_conditions
from dpo_jax.diffusion.data.places import FileBytes, ImageError, MemoryBytes, MemoryImage, read_bytes

RANDOM = np.random.default_rng(0)
PIXELS = np.repeat(np.repeat(RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8), 8, 0), 8, 1)  # 40 x 56


def encoded(image, kind="PNG", **options) -> MemoryBytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    data = io.BytesIO()
    image.save(data, kind, **options)
    return MemoryBytes(data.getvalue())


def png(width, height, depth=8, colour=2, body=b"") -> MemoryBytes:
    """A PNG with any header; the body need not fit it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return MemoryBytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_formats_come_back(kind):
    few = (PIXELS // 128) * 255  # GIF has a palette
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(few, kind, **options)), few)


def test_jpeg_and_images_in_memory():
    assert np.abs(decode(encoded(PIXELS, "JPEG", quality=95)).astype(int) - PIXELS).mean() < 8
    np.testing.assert_array_equal(decode(MemoryImage(Image.fromarray(PIXELS))), PIXELS)


def test_modes_become_rgb_or_are_refused_by_option():
    colour = Image.fromarray(PIXELS)
    cases = {
        "CMYK": encoded(colour.convert("CMYK"), "TIFF"),
        "P": encoded(colour.quantize(64)),
        "RGBA": encoded(colour.convert("RGBA")),
        "LA": encoded(colour.convert("LA")),
        "1": encoded(colour.convert("1")),
    }
    for mode, place in cases.items():
        assert decode(place).shape == PIXELS.shape and decode(place).dtype == np.uint8
        with pytest.raises(ImageError, match=f"mode {mode}.*expected 8-bit RGB or grey"):
            decode(place, on_mode="error")
    np.testing.assert_array_equal(decode(cases["RGBA"]), PIXELS)
    np.testing.assert_array_equal(decode(encoded(PIXELS), on_mode="error"), PIXELS)
    assert decode(encoded(colour.convert("L")), on_mode="error").shape == PIXELS.shape


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    place = encoded(Image.fromarray(levels))
    np.testing.assert_array_equal(decode(place), np.repeat((levels // 257).astype(np.uint8)[..., None], 3, 2))
    wide = png(2, 1, depth=16, body=b"\0" + struct.pack(">6H", 65535, 0, 0x8000, 0, 65535, 0))
    assert decode(wide).tolist() == [[[255, 0, 128], [0, 255, 0]]]
    for sixteen in (place, wide):
        with pytest.raises(ImageError, match="16 bits"):
            decode(sixteen, on_mode="error")
    with pytest.raises(ImageError, match="at most 16 bits"):
        decode(encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"))
    with pytest.raises(ImageError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


def test_transparency_is_laid_over_white():
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0], clear[0, 1] = (255, 0, 0, 255), (0, 0, 0, 128)
    assert decode(encoded(clear)).tolist() == [[[255, 0, 0], [127, 127, 127]], [[255] * 3, [255] * 3]]
    palette = Image.fromarray(PIXELS).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert decode(encoded(palette))[0, 0].tolist() == [255, 255, 255]


def test_rotation_of_exif_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    turned = decode(encoded(PIXELS, "PNG", exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(PIXELS, -1))


def frames(kind):
    others = [Image.fromarray(255 - PIXELS)]
    return encoded(PIXELS, kind, save_all=True, append_images=others)


@pytest.mark.parametrize(
    "place, reason",
    [
        (MemoryBytes(b""), "no bytes"),
        (MemoryBytes(b"not an image"), "12 bytes that are no image of the formats"),
        (MemoryBytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no image of the formats"),
        (MemoryBytes(encoded(PIXELS, "JPEG").data[:-400]), "broken or cut off"),
        (MemoryBytes(encoded(PIXELS).data[:-60]), "broken or cut off"),
        (frames("GIF"), "GIF image has more than one frame"),
        (frames("PNG"), "PNG image has more than one frame"),
        (frames("WEBP"), "WEBP image has more than one frame"),
        (frames("TIFF"), "TIFF image has more than one frame"),
        (png(0, 5), "no image|no pixels|broken"),
        (png(9000, 9000), "decompression bomb, or too large: 9000 x 9000"),
        (png(2**31 - 1, 2**31 - 1), "decompression bomb"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_say_why(place, reason):
    with pytest.raises(ImageError, match=reason):
        decode(place)


def test_previews_behind_a_photograph_are_no_animation():
    np.testing.assert_allclose(decode(frames("MPO")).astype(int), PIXELS, atol=160)


def test_the_limit_of_pixels_is_an_option():
    with pytest.raises(ImageError, match="more than 100 pixels"):
        decode(encoded(PIXELS), max_pixels=100)


def test_the_limit_can_be_raised_above_that_of_pillow(monkeypatch):
    pixels = PIXELS.shape[0] * PIXELS.shape[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 3)  # Pillow itself refuses above twice its limit
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(encoded(PIXELS), max_pixels=pixels // 3)
    np.testing.assert_array_equal(decode(encoded(PIXELS), max_pixels=pixels), PIXELS)


def test_parts_of_files(tmp_path):
    path = tmp_path / "parts"
    path.write_bytes(b"xx" + encoded(PIXELS).data + b"yy")
    place = FileBytes(str(path), 2, len(encoded(PIXELS).data))
    np.testing.assert_array_equal(decode(place), PIXELS)
    with pytest.raises(ImageError, match="ends after 2 of the image's 9 bytes"):
        read_bytes(FileBytes(str(path), path.stat().st_size - 2, 9))
    with pytest.raises(ImageError, match="cannot be read"):
        read_bytes(FileBytes(str(tmp_path / "missing.png")))
    with open(tmp_path / "huge.png", "wb") as huge:
        huge.truncate(1 << 29)
    with pytest.raises(ImageError, match="at most"):
        read_bytes(FileBytes(str(tmp_path / "huge.png")))


SEEDS = [encoded(PIXELS, kind).data for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]
SEEDS += [frames("GIF").data, png(3, 3, 16).data, encoded(PIXELS, "TIFF", compression="tiff_lzw").data]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SEEDS), st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_are_an_image_or_an_image_error(seed, data):
    broken = bytearray(seed)
    for place in data.draw(st.lists(st.integers(0, len(seed) - 1), max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    broken = bytes(broken[: data.draw(st.integers(0, len(seed)) | st.just(len(seed)))])
    try:
        image = decode(MemoryBytes(broken), max_pixels=1 << 20)
    except ImageError as error:
        assert str(error)
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


def test_buckets_fit_their_area():
    buckets = make_buckets()
    assert Bucket(1024, 1024) in buckets and Bucket(1152, 896) in buckets and Bucket(832, 1216) in buckets
    for height, width in buckets:
        assert height % 64 == width % 64 == 0 and height * width <= 1024 * 1024
        assert max(height, width) <= 2 * min(height, width)
    ratios = [b.width / b.height for b in buckets]
    assert ratios == sorted(ratios)
    with pytest.raises(ValueError, match="lower the step"):
        make_buckets(100, step=64)
    assert nearest_bucket([(500, 500)], buckets) == (1024, 1024)
    assert nearest_bucket([(100, 200), (200, 100)], buckets) == (1024, 1024)
    assert nearest_bucket([(10, 1000)], buckets) == buckets[-1]


def test_centre_crop_equals_resize_then_crop():
    small = (Bucket(16, 16),)
    prepared = prepare([PIXELS, PIXELS[:, :40]], small)
    whole = Image.fromarray(PIXELS).resize((22, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[:, 3:19].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(prepared.images[0], expected, atol=1.01 / 127.5)
    assert prepared.images.dtype == np.float32 and np.abs(prepared.images).max() <= 1
    assert prepared.original_sizes.tolist() == [[40, 56], [40, 40]]
    assert prepared.crops.tolist() == [[0, 3], [0, 0]]
    assert size_conditions(prepared).tolist() == [[40, 56, 0, 3, 16, 16], [40, 40, 0, 0, 16, 16]]


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(prepare([stripes], [Bucket(8, 8)]).images[:, :, 1:-1]).max() < 0.05


def test_random_crops_and_flips():
    ramp = np.repeat(np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 20, 0), 3, 2)  # 20 x 60
    seen = set()
    random = np.random.default_rng(0)
    for _ in range(60):
        prepared = prepare([ramp], [Bucket(20, 20)], random=random, flip=0.5)
        row = ((prepared.images[0, 0, :, 0] + 1) * 127.5).round().astype(int)
        left = prepared.crops[0, 1]
        source = ramp[0, ::-1, 0] if row[0] > row[-1] else ramp[0, :, 0]
        np.testing.assert_allclose(row, source[left : left + 20], atol=1)
        seen.add((row[0] > row[-1], left))
    assert len(seen) > 20 and {flipped for flipped, _ in seen} == {True, False}
    with pytest.raises(ValueError, match="give `random`"):
        prepare([ramp], [Bucket(20, 20)], flip=0.5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9))
def test_any_size_fills_its_bucket(height, width, seed):
    image = np.full((height, width, 3), 200, np.uint8)
    prepared = prepare([image], make_buckets(64 * 64, step=8), random=np.random.default_rng(seed))
    assert prepared.images.shape == (1, *prepared.bucket, 3)
    np.testing.assert_allclose(prepared.images, 200 / 127.5 - 1, atol=1e-6)
    assert (prepared.crops >= 0).all()


def test_a_line_of_pixels_stays_small():
    line = np.zeros((1, 60000, 3), np.uint8)
    assert prepare([line], make_buckets()).images.shape[1:3] == make_buckets()[-1]
    assert images.MAX_PIXELS > 60000
