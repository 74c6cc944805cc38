"""Videos: Baidu's frames written out from the spec, the time drawn on them, and each kind of bad input."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import av
import numpy as np
import pytest
from PIL import Image, ImageChops

from duomo.errors import MediaError, MediaTooLarge, UnsupportedMedia
from duomo.processing import video
from duomo.processing.messages import VideoPart
from duomo.processing.video import frame_indices, load_video, probe, stamp

SMALL = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}


def film(
    num_frames: int, fps: int = 10, size: tuple[int, int] = (64, 48), form: str = "mp4", codec: str = "mpeg4"
) -> bytes:
    """Frame i is grey of level 4*i."""
    file = BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if codec != "gif" else "rgb8"
        for index in range(num_frames):
            level = np.full((size[1], size[0], 3), 4 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "asked", "wanted"),
    [
        # 10 s at 30 a second: 20 frames, 15 apart
        (300, 30.0, {}, list(range(0, 300, 15))),
        # 2 s at 25: 4 is less than 16, so floor(i * 50 / 16)
        (50, 25.0, {}, [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 46]),
        # 0.7 s at 10: fewer frames than 16, so all, and the last twice
        (7, 10.0, {}, [0, 1, 2, 3, 4, 5, 6, 6]),
        (1, 10.0, {}, [0, 0]),
        (2, 10.0, {}, [0, 1]),
        # 8.508 s at 29.97: round(t * 29.97) of t = 0, 0.5, ... 8.5; the last is 254.7, so 255, past the end
        (255, 29.97, {}, [0, 15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165, 180, 195, 210, 225, 240, 240]),
        # 12.5 a second: half a frame rounds to even (6.25 6, 12.5 12, 18.75 19, 25, 31.25 31, 37.5 38 ...)
        (100, 12.5, {}, [0, 6, 12, 19, 25, 31, 38, 44, 50, 56, 62, 69, 75, 81, 88, 94]),
        # 8.5 s at 10: 17 frames, an odd number
        (85, 10.0, {}, [*range(0, 85, 5), 80]),
        (300, 30.0, {"fps": 1.0}, [0, 18, 37, 56, 75, 93, 112, 131, 150, 168, 187, 206, 225, 243, 262, 281]),
        (300, 30.0, {"fps": 1.0, "min_frames": 4}, list(range(0, 300, 30))),
        (96, 30.0, {"min_frames": 2, "max_frames": 4}, [0, 24, 48, 72]),
        (300, 30.0, {"target_frames": 4, "fps": 30.0}, [0, 75, 150, 225]),
        (300, 30.0, {"target_frames": 3}, [0, 100, 200, 200]),
        (3, 30.0, {"target_frames": 8}, [0, 1, 2, 2]),
    ],
)  # fmt: skip
def test_frames_are_baidus(
    num_frames: int, source_fps: float, asked: dict[str, float], wanted: list[int]
) -> None:
    assert frame_indices(num_frames, source_fps, **asked) == wanted  # type: ignore[arg-type]


def test_a_long_video_gives_180_frames_evenly_spread() -> None:
    found = frame_indices(9000, 30.0)  # 5 minutes
    assert (len(found), found[:3], found[-1]) == (180, [0, 50, 100], 8950)
    assert len(frame_indices(30 * 90, 30.0)) == 180
    assert len(frame_indices(30 * 3600, 30.0)) == 180


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("gif", "gif")]
)
def test_containers(form: str, codec: str) -> None:
    media = load_video(VideoPart(film(20, form=form, codec=codec), **SMALL))
    assert media.kind == "video" and media.grid.frames == 16
    assert media.patches.shape == (media.grid.num_patches, 588)
    assert media.grid.num_tokens == 8 * media.grid.rows * media.grid.columns // 4


def test_the_frames_chosen_are_the_frames_decoded() -> None:
    part = VideoPart(film(40, form="matroska", codec="ffv1"), target_frames=4, **SMALL)
    media = load_video(part)
    per_frame = media.grid.rows * media.grid.columns
    lower_right = [media.patches[(i + 1) * per_frame - 1] for i in range(4)]  # where no time is drawn
    levels = [int(patch.mean()) for patch in lower_right]
    assert np.allclose(levels, [0, 40, 80, 120], atol=1)


def test_a_video_of_one_frame_has_two() -> None:
    media = load_video(VideoPart(film(1), **SMALL))
    assert media.grid.frames == 2
    assert np.array_equal(*np.split(media.patches, 2))


def test_default_pixels_of_a_frame() -> None:
    media = load_video(VideoPart(film(2, size=(320, 240))))
    assert 234_416 <= media.grid.rows * media.grid.columns * 14**2 <= 937_664
    tiny = load_video(VideoPart(film(2, size=(320, 240)), max_pixels=100_000))
    assert tiny.grid.rows * tiny.grid.columns * 14**2 <= 100_000


def test_the_time_is_drawn_before_resizing() -> None:
    blank = Image.new("RGB", (640, 480), (90, 90, 90))
    early, late = stamp(blank.copy(), 5.5), stamp(blank.copy(), 3725.25)
    box = ImageChops.difference(blank, early).getbbox()
    assert box is not None and box[0] <= 6 and box[3] <= 64 and 300 < box[2] < 420  # size 48, one line
    assert {(0, 0, 0), (255, 255, 255)} <= {colour for _, colour in early.getcolors(1 << 20) or ()}
    changed = ImageChops.difference(early, late).getbbox()
    assert changed is not None and changed[0] > 100  # `time: ` is the same
    small = stamp(Image.new("RGB", (64, 48), (90, 90, 90)), 0.0)
    assert ImageChops.difference(small, Image.new("RGB", (64, 48), (90, 90, 90))).getbbox() is not None


def test_the_time_is_that_of_the_frame() -> None:
    """A film of one colour: the frames of a second and of two differ by their times alone."""
    part = VideoPart(film(1, fps=10, size=(320, 240)))
    again = VideoPart(film(1, fps=10, size=(320, 240)))
    assert load_video(part).content_hash == load_video(again).content_hash
    other = VideoPart(film(20, fps=10, size=(320, 240)), target_frames=2)
    halves = np.split(load_video(other).patches, 2)
    assert not np.array_equal(*halves)


def sound_alone() -> bytes:
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


BAD: list[tuple[Callable[[], bytes], str]] = [
    (lambda: b"", "no format"),
    (lambda: b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n", "no format"),
    (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "no format"),
    (lambda: film(40)[:3000], "damaged or cut off"),
    (lambda: b"\0\0\0\x20ftypisom" + b"x" * 300, "damaged or cut off"),
    (lambda: b"\x1a\x45\xdf\xa3" + b"x" * 300, "damaged or cut off"),
    (sound_alone, "no video in it"),
]


@pytest.mark.parametrize(("data", "complaint"), BAD)
def test_bad_videos_say_what_is_wrong_in_one_line(data: Callable[[], bytes], complaint: str) -> None:
    with pytest.raises(UnsupportedMedia, match=complaint) as caught:
        load_video(VideoPart(data()))
    said = str(caught.value)
    assert "\n" not in said and "0x" not in said and "/" not in said


def test_a_video_of_too_many_pixels_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MOST_DECODED_PIXELS", 20 * 64 * 48 - 1)
    with pytest.raises(MediaTooLarge, match="20 frames of 3,072 pixels") as caught:
        load_video(VideoPart(film(20)))
    assert caught.value.facts == {"needed": 61_440, "available": 61_439}
    monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 3071)
    with pytest.raises(MediaTooLarge, match="frames have 3,072 pixels"):
        load_video(VideoPart(film(20)))


@pytest.mark.parametrize(
    "asked",
    [
        {"fps": 0.0},
        {"fps": -1.0},
        {"fps": float("nan")},
        {"min_frames": 20, "max_frames": 10},
        {"max_frames": 10_000},
        {"target_frames": 10_000},
        {"target_frames": -2},
        {"min_pixels": 9000, "max_pixels": 8000},
        {"max_pixels": 1 << 40},
    ],
)
def test_settings_that_cannot_be(asked: dict[str, float]) -> None:
    with pytest.raises(MediaError, match=r"must|at most"):
        load_video(VideoPart(film(20), **asked))  # type: ignore[arg-type]


def test_a_film_cut_off_at_its_end_repeats_its_last_frame() -> None:
    whole = film(40, form="matroska")
    media = load_video(VideoPart(whole[: len(whole) * 2 // 3], **SMALL))
    assert media.grid.frames % 2 == 0 and media.patches.any()


def test_probe_counts_frames_without_decoding() -> None:
    assert tuple(probe(film(37, fps=25))) == (37, 25.0)
