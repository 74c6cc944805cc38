"""A video to patches: the frames ERNIE would take, each with its time written on it, in pairs.

Which frames is Baidu's rule (spec section 5), not transformers'. The time is drawn before resizing, in the
font that lies next to this file (Roboto, Apache-2.0). The number of frames is even always: two of them share
their tokens. Frames are decoded one after another and only those taken are kept, at their final size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from duomo.errors import MediaError, MediaTooLarge, UnsupportedMedia
from duomo.processing.images import MAX_DECODED_PIXELS, content_hash, fit
from duomo.processing.messages import VideoPart
from duomo.processing.patches import FACTOR_PX, patchify
from duomo.processing.prompt import Grid, Media

FPS = 2.0
MIN_FRAMES = 16
MAX_FRAMES = 180
MIN_PIXELS = 299 * FACTOR_PX**2  # of a frame
MAX_PIXELS = 1196 * FACTOR_PX**2
MOST_FRAMES = 360  # that a request may ask for
MOST_DECODED_PIXELS = 200_000_000_000  # of the file: an hour of 1080p at 27 a second
BICUBIC = Image.Resampling.BICUBIC
_FONT = Path(__file__).parent / "fonts" / "Roboto-Regular.ttf"


class _Clip(NamedTuple):
    num_frames: int
    fps: float  # of the file


def load_video(part: VideoPart) -> Media:
    """Patches of a video's frames. UnsupportedMedia or MediaTooLarge if it cannot be one."""
    clip = probe(part.data)
    most = part.max_frames or max(MAX_FRAMES, part.min_frames or 0)
    wanted = frame_indices(
        clip.num_frames,
        clip.fps,
        fps=part.fps if part.fps is not None else FPS,
        min_frames=part.min_frames or min(MIN_FRAMES, most),
        max_frames=most,
        target_frames=part.target_frames,
    )
    high = part.max_pixels or max(MAX_PIXELS, part.min_pixels or 0)
    low = part.min_pixels or (MIN_PIXELS if high >= MIN_PIXELS else 1)
    patches: npt.NDArray[np.uint8] | None = None
    one, size, taken = Grid(1, 0, 0), (0, 0), 0
    for index, picture in _pictures(part.data, set(wanted)):
        stamped = stamp(picture, index / clip.fps)
        resized = fit(stamped, low, high) if patches is None else stamped.resize(size, BICUBIC)
        of_frame, one = patchify(np.asarray(resized))
        if patches is None:
            size = resized.size  # frames may change theirs; the first decides
            patches = np.empty((len(wanted), *of_frame.shape), dtype=np.uint8)
        # A file that promised more frames than it has repeats its last one.
        taken = wanted.index(index)
        patches[taken:] = of_frame
    if patches is None:
        raise UnsupportedMedia("the video has no frame that can be decoded")
    grid = Grid(len(wanted), one.rows, one.columns)
    flat = patches.reshape(grid.num_patches, -1)
    return Media("video", flat, grid, content_hash(flat, grid))


def frame_indices(
    num_frames: int,
    source_fps: float,
    *,
    fps: float = FPS,
    min_frames: int = MIN_FRAMES,
    max_frames: int = MAX_FRAMES,
    target_frames: int | None = None,
) -> list[int]:
    """Indices of the frames taken, an even number; the last stands twice where they would be odd.

    `fps` frames a second of the video's time; fewer than `min_frames` or more than `max_frames` become that
    many, evenly spread ("leading": the first of each stretch). `target_frames` overrules all three.
    """
    if not (fps > 0 and math.isfinite(fps)):
        raise UnsupportedMedia(f"fps is {fps:g}; it must be more than 0")
    if not 1 <= min_frames <= max_frames <= MOST_FRAMES:
        raise UnsupportedMedia(
            f"min_frames is {min_frames} and max_frames {max_frames}; they must rise from 1 to {MOST_FRAMES}"
        )
    if target_frames is not None and not 1 <= target_frames <= MOST_FRAMES:
        raise UnsupportedMedia(f"target_frames is {target_frames}; it must be from 1 to {MOST_FRAMES}")
    duration = num_frames / source_fps
    count = target_frames if target_frames is not None else int(duration * fps)
    if target_frames is None and min_frames <= count <= max_frames:
        times = np.arange(0, duration, 1 / fps)
        chosen = [index for index in (round(time * source_fps) for time in times) if index < num_frames]
    else:
        count = count if target_frames is not None else min(max(count, min_frames), max_frames)
        count = min(count, num_frames)
        chosen = [int(index) for index in np.floor(np.linspace(0, num_frames, count + 1))[:-1]]
    return chosen if len(chosen) % 2 == 0 else [*chosen, chosen[-1]]


def stamp(picture: Image.Image, seconds: float) -> Image.Image:
    """The same picture with `time: HH:MM:SS.ss` in its upper left corner, black with a white edge."""
    size = max(1, int(0.1 * min(picture.size)))
    text = f"time: {int(seconds // 3600):02d}:{int(seconds % 3600 // 60):02d}:{seconds % 60:05.2f}"
    edge = int(0.1 * size)
    ImageDraw.Draw(picture).text(
        (0, 0), text, font=_font(size), fill="black", stroke_width=edge, stroke_fill="white"
    )
    return picture


def load_frames(frames: npt.NDArray[np.uint8], times: Sequence[float]) -> Media:
    """A video whose frames are there already, uint8 [F, height, width, 3], at `times` in seconds."""
    patches, grid = patchify(stamp_frames(frames, times))
    return Media("video", patches, grid, content_hash(patches, grid))


def stamp_frames(frames: npt.NDArray[np.uint8], times: Sequence[float]) -> npt.NDArray[np.uint8]:
    """RGB frames [F, height, width, 3] with their seconds written on them; a lone picture has no times."""
    if not times:
        return frames
    stamped = [stamp(Image.fromarray(frame), t) for frame, t in zip(frames, times, strict=True)]
    return np.stack([np.asarray(picture) for picture in stamped])


@lru_cache(maxsize=32)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT), size_px)


def probe(data: bytes) -> _Clip:
    """Number of frames and their rate; frames are counted by packets where the header doesn't say."""
    try:
        with _open(data) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_DECODED_PIXELS:
                raise MediaTooLarge(
                    f"the video's frames have {stream.width * stream.height:,} pixels; at most"
                    f" {MAX_DECODED_PIXELS:,} are decoded",
                    needed=stream.width * stream.height,
                    available=MAX_DECODED_PIXELS,
                )
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            area = max(1, stream.width * stream.height)
            count = sum(packet.size > 0 for packet in container.demux(stream))
    except MediaError:
        raise
    except Exception as error:  # FFmpeg's errors and, for damaged files, nearly anything of Python's
        raise _damaged() from error
    if count == 0:
        raise UnsupportedMedia("the video has no frame that can be decoded")
    if count * area > MOST_DECODED_PIXELS:
        raise MediaTooLarge(
            f"the video has {count:,} frames of {area:,} pixels, {MOST_DECODED_PIXELS:,} pixels in all are"
            " decoded; send a shorter or a smaller one",
            needed=count * area,
            available=MOST_DECODED_PIXELS,
        )
    return _Clip(count, fps if fps > 0 and math.isfinite(fps) else FPS)


def _open(data: bytes) -> av.container.InputContainer:
    # The format is named, never guessed: FFmpeg, when it guesses, takes a text for a playlist and fetches
    # the addresses in it.
    if data[4:8] == b"ftyp":
        kind = "mov"
    elif data.startswith(b"\x1a\x45\xdf\xa3"):
        kind = "matroska"
    elif data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        kind = "avi"
    elif data.startswith((b"GIF87a", b"GIF89a")):
        kind = "gif"
    else:
        raise UnsupportedMedia("the video is in no format that is read here (MP4, WebM, Matroska, AVI, GIF)")
    container = av.open(BytesIO(data), mode="r", format=kind, metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise UnsupportedMedia("the file has no video in it; sound alone is not read")
    return container


def _pictures(data: bytes, wanted: set[int]) -> Iterator[tuple[int, Image.Image]]:
    """The wanted frames as RGB pictures, upright, in order; what is damaged at the end is left out."""
    last = max(wanted)
    index = 0
    try:
        with _open(data) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if index in wanted:
                    yield index, _upright(frame)
                index += 1
                if index > last:
                    return
    except MediaError:
        raise
    except av.FFmpegError as error:
        if index == 0:
            raise _damaged() from error


def _upright(frame: av.VideoFrame) -> Image.Image:
    turned = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = turned.get(int(getattr(frame, "rotation", 0)) % 360)
    return picture if turn is None else picture.transpose(turn)


def _damaged() -> UnsupportedMedia:
    return UnsupportedMedia("the video is damaged or cut off and cannot be decoded")
