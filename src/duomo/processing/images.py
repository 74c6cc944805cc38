"""An encoded picture to patches: decoded safely, made RGB, resized as ERNIE was trained, cut into patches.

Sizes are judged from the header, before a pixel is decoded, so a small file that unfolds to gigabytes is
refused at once. Formats are an allow-list. No message repeats what Pillow said: that may quote addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from duomo.errors import MediaTooLarge, UnsupportedMedia
from duomo.processing.messages import ImagePart
from duomo.processing.patches import FACTOR_PX, patchify
from duomo.processing.prompt import Grid, Media

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MIN_PIXELS = 4 * FACTOR_PX**2
MAX_PIXELS = 6177 * FACTOR_PX**2
MOST_PIXELS = 16384 * FACTOR_PX**2  # a request may raise max_pixels this far: the Thinking model's bound
MAX_DECODED_PIXELS = 89_000_000  # of the file itself, before any resizing; Pillow warns from 89.5 million on
MAX_RATIO = 200


def load_image(part: ImagePart) -> Media:
    """Patches of a picture. UnsupportedMedia or MediaTooLarge if it cannot be one."""
    high = part.max_pixels or max(MAX_PIXELS, part.min_pixels or 0)
    low = part.min_pixels or (MIN_PIXELS if high >= MIN_PIXELS else 1)
    picture = fit(decode_image(part.data), low, high)
    patches, grid = patchify(np.asarray(picture))
    return Media("image", patches, grid, content_hash(patches, grid))


def fit(picture: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """Resized to sides that are multiples of 28 and an area between the bounds."""
    height, width = smart_resize(picture.height, picture.width, min_pixels, max_pixels)
    if picture.size == (width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def decode_image(data: bytes) -> Image.Image:
    """RGB, upright, transparent parts on white; the first frame of an animation."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            _check_size(*picture.size)
            picture.load()
            return to_rgb(_upright(picture))
    except MediaTooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise MediaTooLarge(f"the picture has too many pixels; at most {MAX_DECODED_PIXELS:,}") from error
    except UnidentifiedImageError as error:
        allowed = ", ".join(FORMATS)
        raise UnsupportedMedia(f"the picture is in no format that is read here ({allowed})") from error
    except (
        Exception
    ) as error:  # a damaged file makes Pillow's readers raise anything, KeyError to struct.error
        raise UnsupportedMedia("the picture is damaged or cut off and cannot be decoded") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_DECODED_PIXELS:
        raise MediaTooLarge(
            f"the picture has {width * height:,} pixels; at most {MAX_DECODED_PIXELS:,} are decoded",
            needed=width * height,
            available=MAX_DECODED_PIXELS,
        )


def _upright(picture: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """16-bit greys keep their upper byte; alpha and palette transparency lie on white."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Sides in multiples of 28 with about the same shape and an allowed area (spec section 5).

    Rounds half to even, as Python does and as ERNIE's own processor does.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise UnsupportedMedia(f"the picture is {width}x{height}; no side may be {MAX_RATIO} times the other")
    if not 0 < min_pixels <= max_pixels:
        raise UnsupportedMedia(
            f"min_pixels is {min_pixels:,}; it must be from 1 to max_pixels, {max_pixels:,}"
        )
    if max_pixels > MOST_PIXELS:
        raise MediaTooLarge(
            f"max_pixels is {max_pixels:,}; at most {MOST_PIXELS:,} are allowed",
            needed=max_pixels,
            available=MOST_PIXELS,
        )
    rows = round(height / FACTOR_PX) * FACTOR_PX
    columns = round(width / FACTOR_PX) * FACTOR_PX
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(FACTOR_PX, math.floor(height / shrink / FACTOR_PX) * FACTOR_PX)
        columns = max(FACTOR_PX, math.floor(width / shrink / FACTOR_PX) * FACTOR_PX)
    elif rows * columns < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * stretch / FACTOR_PX) * FACTOR_PX
        columns = math.ceil(width * stretch / FACTOR_PX) * FACTOR_PX
    return rows, columns


def content_hash(patches: npt.NDArray[np.uint8], grid: Grid) -> bytes:
    """Of the pixels the model sees and their arrangement: equal only if the model cannot tell them apart."""
    digest = hashlib.blake2b(repr(tuple(grid)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(patches).data)
    return digest.digest()
