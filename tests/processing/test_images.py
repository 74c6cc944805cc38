"""Pictures: transformers' own pixels and token counts, every mode of pixels, and each kind of bad input."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from duomo.errors import MediaTooLarge, UnsupportedMedia
from duomo.processing.images import MAX_PIXELS, MIN_PIXELS, decode_image, load_image, smart_resize
from duomo.processing.messages import ImagePart
from duomo.processing.patches import MEAN, STD, normalize, patchify
from duomo.processing.prompt import Grid

ODD_SIZES = [
    (1, 1), (1, 200), (200, 1), (13, 15), (14, 14), (27, 29), (28, 28), (41, 43), (42, 70), (55, 57),
    (56, 56), (97, 31), (101, 303), (210, 126), (333, 77), (350, 350), (511, 129), (37, 1500), (800, 450),
]  # fmt: skip


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth and rough at once: resizing shows every difference of a filter."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = 120 + 100 * np.sin(rows / 7)[..., None] * np.cos(columns / 5)[..., None]
    return Image.fromarray((waves + rng.integers(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", ODD_SIZES)
def test_pixels_and_token_counts_are_those_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeImageProcessorPil,
    )

    picture = noise(*size)
    theirs = Ernie4_5_VLMoeImageProcessorPil()(picture, return_tensors="np")
    ours = load_image(ImagePart(encoded(picture)))
    assert list(ours.grid) == theirs["image_grid_thw"][0].tolist()
    assert ours.grid.num_tokens == int(theirs["image_grid_thw"][0].prod()) // 4
    levels = np.repeat(1 / (255 * STD), 14**2)  # one level of uint8, after normalisation
    assert (np.abs(normalize(ours.patches) - theirs["pixel_values"]) <= levels * 1.001).all()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_token_counts_of_any_size_are_those_of_transformers(height: int, width: int) -> None:
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
        smart_resize as theirs,
    )

    assume(max(height, width) <= 200 * min(height, width))
    wanted = theirs(height, width, 28, MIN_PIXELS, MAX_PIXELS)
    assert smart_resize(height, width, MIN_PIXELS, MAX_PIXELS) == wanted


@pytest.mark.parametrize(
    ("size", "bounds", "wanted"),
    [
        ((28, 28), (MIN_PIXELS, MAX_PIXELS), (56, 56)),
        ((42, 42), (1, MAX_PIXELS), (56, 56)),  # 1.5 to even: 2
        ((70, 70), (1, MAX_PIXELS), (56, 56)),  # 2.5 to even: 2
        ((98, 98), (1, MAX_PIXELS), (112, 112)),  # 3.5 to even: 4
        ((10, 1990), (MIN_PIXELS, MAX_PIXELS), (28, 812)),  # rounds to no row at all first
        ((3000, 4000), (MIN_PIXELS, MAX_PIXELS), (1904, 2520)),
        ((480, 640), (MIN_PIXELS, 512 * 512), (420, 588)),
        ((100, 100), (234_416, 937_664), (504, 504)),
    ],
)
def test_smart_resize_in_numbers(
    size: tuple[int, int], bounds: tuple[int, int], wanted: tuple[int, int]
) -> None:
    assert smart_resize(*size, *bounds) == wanted


def test_patches_are_blocks_of_two_by_two_with_channels_first() -> None:
    rows, columns = np.mgrid[:56, :84]
    picture = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    patches, grid = patchify(picture)
    assert grid == Grid(1, 4, 6)
    corners = [(int(p[0]), int(p[14 * 14])) for p in patches[:8]]
    assert corners == [(0, 0), (0, 14), (14, 0), (14, 14), (0, 28), (0, 42), (14, 28), (14, 42)]
    assert patches[0].reshape(3, 14, 14)[0, :, 5].tolist() == list(range(14))
    assert patches[0].reshape(3, 14, 14)[1, 5].tolist() == list(range(14))


def test_normalize_by_channel() -> None:
    found = normalize(np.full((1, 588), 255, np.uint8)).reshape(3, 196)
    assert found.dtype == np.float32
    assert np.allclose(found, ((1 - MEAN) / STD)[:, None], atol=1e-6)


def corner(data: bytes) -> tuple[int, ...]:
    pixel = decode_image(data).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return tuple(int(level) for level in pixel)


def palette_with_hole() -> bytes:
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    return encoded(picture, transparency=0)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (lambda: encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), (255, 255, 255)),
        (lambda: encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), (255, 204, 204)),
        (lambda: encoded(Image.new("LA", (8, 8), (0, 0))), (255, 255, 255)),
        (palette_with_hole, (255, 255, 255)),
        (lambda: encoded(Image.new("P", (8, 8), 0), "GIF"), (0, 0, 0)),
        (lambda: encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
        (lambda: encoded(Image.new("L", (8, 8), 77), "BMP"), (77, 77, 77)),
        (lambda: encoded(Image.new("I;16", (8, 8), 0x8012)), (128, 128, 128)),
        (lambda: encoded(Image.new("I;16", (8, 8), 0xFFFF), "TIFF"), (255, 255, 255)),
        (lambda: encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "TIFF"), (255, 255, 255)),
        (lambda: encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (lambda: encoded(Image.new("RGB", (8, 8), (9, 8, 7)), "WEBP", lossless=True), (9, 8, 7)),
    ],
)
def test_every_kind_of_pixels_becomes_rgb(data: Callable[[], bytes], wanted: tuple[int, ...]) -> None:
    assert corner(data()) == wanted


def test_cmyk_jpeg_is_read_the_right_way_round() -> None:
    red = corner(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert red[0] > 240 and max(red[1:]) < 15


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert corner(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_every_orientation_upright(orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste((0, 0, 0), (0, 0, 20, 12))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose; 90 and 270 swap
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(decode_image(encoded(stored, exif=exif)))
    assert np.array_equal(found, np.asarray(upright))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_bomb(side: int = 30_000) -> bytes:
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def text_bomb() -> bytes:
    whole = encoded(Image.new("RGB", (8, 8)))
    body = b"Comment\0\0" + zlib.compress(b"\0" * (80 << 20), 9)
    return whole[:33] + chunk(b"zTXt", body) + whole[33:]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
BAD = [
    (lambda: b"", UnsupportedMedia, "no format"),
    (lambda: b"<html>not found</html>", UnsupportedMedia, "no format"),
    (lambda: SVG, UnsupportedMedia, "no format"),
    (lambda: encoded(Image.new("RGB", (8, 8)), "JPEG2000"), UnsupportedMedia, "no format"),
    (lambda: encoded(Image.new("RGB", (8, 8)), "PPM"), UnsupportedMedia, "no format"),
    (lambda: encoded(noise(300, 200), "JPEG")[:2000], UnsupportedMedia, "damaged or cut off"),
    (lambda: encoded(noise(300, 200), "PNG")[:2000], UnsupportedMedia, "damaged or cut off"),
    (lambda: encoded(noise(300, 200), "WEBP")[:2000], UnsupportedMedia, "damaged or cut off"),
    (lambda: encoded(noise(300, 200), "TIFF")[:2000], UnsupportedMedia, "damaged or cut off|no format"),
    (lambda: encoded(noise(300, 200), "BMP")[:2000], UnsupportedMedia, "damaged or cut off"),
    (text_bomb, UnsupportedMedia, "damaged|no format"),
    (png_bomb, MediaTooLarge, "900,000,000 pixels|too many pixels"),
    (lambda: png_bomb(9500), MediaTooLarge, "90,250,000 pixels; at most 89,000,000"),
    (lambda: encoded(Image.new("RGB", (202, 1))), UnsupportedMedia, "202x1; no side may be 200 times"),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "kind", "complaint"), BAD)
def test_bad_pictures_say_what_is_wrong_in_one_line(
    data: Callable[[], bytes], kind: type[Exception], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint) as caught:
        load_image(ImagePart(data()))
    said = str(caught.value)
    assert "\n" not in said and "0x" not in said and "/" not in said


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(100_000, 50_000, UnsupportedMedia), (None, 13_000_000, MediaTooLarge), (-1, None, UnsupportedMedia)],
)
def test_pixel_bounds_that_cannot_be(low: int | None, high: int | None, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"min_pixels|max_pixels"):
        load_image(ImagePart(encoded(noise(64, 64)), low, high))


def test_pixel_bounds_of_a_request() -> None:
    data = encoded(noise(640, 480))
    assert load_image(ImagePart(data)).grid == Grid(1, 34, 46)
    small = load_image(ImagePart(data, max_pixels=100_000)).grid
    assert small.rows * small.columns * 14**2 <= 100_000
    large = load_image(ImagePart(data, min_pixels=1_000_000)).grid
    assert large.rows * large.columns * 14**2 >= 1_000_000


def test_the_hash_is_of_what_the_model_sees() -> None:
    picture = noise(84, 56)
    first = load_image(ImagePart(encoded(picture)))
    again = load_image(ImagePart(encoded(picture.convert("RGBA"), "TIFF")))
    other = load_image(ImagePart(encoded(noise(84, 56, seed=1))))
    assert first.content_hash == again.content_hash != other.content_hash
    blank = [load_image(ImagePart(encoded(Image.new("RGB", size)))) for size in ((56, 112), (112, 56))]
    assert blank[0].content_hash != blank[1].content_hash
    assert math.prod(blank[0].grid) == math.prod(blank[1].grid)
