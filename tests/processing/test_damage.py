"""Files with bytes changed or cut off: whatever happens, nothing but a MediaError of one line comes out."""

from __future__ import annotations

from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from duomo.errors import MediaError
from duomo.processing.messages import ImagePart, VideoPart
from duomo.processing.template import load_media

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of odd EXIF and the like


def picture(form: str) -> ImagePart:
    file = BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(levels).save(file, form)
    return ImagePart(file.getvalue(), max_pixels=100_000)


def film(form: str, codec: str) -> VideoPart:
    file = BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb8" if codec == "gif" else "yuv420p"
        for level in range(6):
            frame = np.full((48, 64, 3), 40 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return VideoPart(file.getvalue(), min_pixels=784, max_pixels=3136)


WHOLE = [
    *(picture(form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")),
    *(film(*kind) for kind in (("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("gif", "gif"))),
]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(WHOLE), st.data())
def test_damaged_files_raise_media_errors_alone(whole: ImagePart | VideoPart, data: st.DataObject) -> None:
    damaged = bytearray(whole.data)
    place, value = st.integers(0, len(damaged) - 1), st.integers(0, 255)
    for index, level in data.draw(st.lists(st.tuples(place, value), max_size=20)):
        damaged[index] = level
    size = data.draw(st.one_of(st.just(len(damaged)), place))
    kind = ImagePart if isinstance(whole, ImagePart) else VideoPart
    try:
        media = load_media(kind(bytes(damaged[:size]), max_pixels=100_000))
    except MediaError as error:
        assert "\n" not in error.message
    else:
        assert media.patches.shape == (media.grid.num_patches, 588)


@pytest.mark.parametrize("whole", WHOLE)
def test_the_whole_files_are_read(whole: ImagePart | VideoPart) -> None:
    assert load_media(whole).grid.num_patches > 0
