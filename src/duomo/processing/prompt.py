"""A prompt as the engine takes it: ids, decoded media, and where in the ids each medium lies.

Patches stay uint8 (a quarter of float32); `images.normalize` makes them float just before the vision tower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt


class Grid(NamedTuple):
    """Patches of one medium: frames (1 for a picture, even for a video), rows and columns of patches."""

    frames: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Language-model tokens after the resampler: 2x2 patches, and pairs of frames in a video."""
        return max(1, self.frames // 2) * (self.rows // 2) * (self.columns // 2)


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """One decoded picture or video: uint8 patches [P, 3*14*14] in the order of spec section 5."""

    kind: Literal["image", "video"]
    patches: npt.NDArray[np.uint8]
    grid: Grid
    content_hash: bytes  # of the pixels after preprocessing and of the grid; what caches are keyed by


class MediaSpan(NamedTuple):
    """Placeholders ids[start : start + grid.num_tokens] stand for this medium."""

    start: int
    grid: Grid


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """`spans[i]` says where `media[i]` lies; both in prompt order."""

    ids: list[int]
    media: tuple[Media, ...] = ()
    spans: tuple[MediaSpan, ...] = ()
