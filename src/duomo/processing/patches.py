"""Pixels to patches, in the order the vision tower expects, and their normalisation (spec section 5).

2x2 blocks of patches row-major, row-major inside a block, and (channel, row, column) inside a patch: four
consecutive patches are then one token of the language model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from duomo.processing.prompt import Grid

PATCH_PX = 14
MERGE = 2
FACTOR_PX = PATCH_PX * MERGE
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
_SCALE = np.repeat(1 / (255 * STD), PATCH_PX**2).astype(np.float32)  # of each value of a patch
_SHIFT = np.repeat(-MEAN / STD, PATCH_PX**2).astype(np.float32)


def patchify(frames: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], Grid]:
    """RGB [height, width, 3], or frames of it, with sides in multiples of 28 -> patches [P, 588], grid."""
    if frames.ndim == 3:
        frames = frames[None]
    count, height, width, channels = frames.shape
    assert height % FACTOR_PX == 0 and width % FACTOR_PX == 0, (
        f"{height}x{width} is no multiple of {FACTOR_PX}"
    )
    rows, columns = height // PATCH_PX, width // PATCH_PX
    blocks = frames.reshape(
        count, rows // MERGE, MERGE, PATCH_PX, columns // MERGE, MERGE, PATCH_PX, channels
    )
    ordered = blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return ordered.reshape(count * rows * columns, channels * PATCH_PX**2), Grid(count, rows, columns)


def normalize(patches: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 [P, 588] -> float32, (x/255 - mean) / std by channel."""
    values = patches.astype(np.float32)
    values *= _SCALE
    values += _SHIFT
    return values
