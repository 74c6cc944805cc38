"""Where each token stands in time, height and width, and which experts it belongs to.

Positions follow Baidu's rule (spec 3.4): after a medium the next text token stands at the largest position
so far plus one. transformers 5.23 forgets the frames of a long video there; duomo does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from duomo.model.config import ModelConfig, VisionRule

Ints = npt.NDArray[np.int64]


class GridLike(Protocol):
    """Patches of a medium, as `processing.prompt.Grid` counts them."""

    @property
    def frames(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


class SpanLike(Protocol):
    """A medium's place among the ids, as `processing.prompt.MediaSpan`."""

    @property
    def start(self) -> int: ...
    @property
    def grid(self) -> GridLike: ...


def build_positions(num_tokens: int, spans: Sequence[SpanLike] = ()) -> Ints:
    """Positions [3, T], rows (t, h, w). The next token after these stands at `positions.max() + 1`."""
    pieces: list[Ints] = []
    index = current = 0
    for span in spans:
        pieces.append(_text_positions(current, span.start - index))
        current += span.start - index
        medium = _grid_positions(current, span.grid)
        pieces.append(medium)
        current = int(medium.max()) + 1
        index = span.start + medium.shape[1]
    pieces.append(_text_positions(current, num_tokens - index))
    return np.concatenate(pieces, axis=1)


def _text_positions(first: int, count: int) -> Ints:
    assert count >= 0, "a medium's span runs past the prompt, or spans overlap"
    return np.broadcast_to(np.arange(first, first + count, dtype=np.int64), (3, count))


def _grid_positions(first: int, grid: GridLike) -> Ints:
    """Tokens of one medium: 2x2 patches, and pairs of frames in a video; frame-major, row-major."""
    frames, rows, columns = max(1, grid.frames // 2), grid.rows // 2, grid.columns // 2
    return np.indices((frames, rows, columns), dtype=np.int64).reshape(3, -1) + first


def token_routes(ids: Sequence[int] | Ints, config: ModelConfig) -> npt.NDArray[np.bool_]:
    """True where a token goes to the vision experts, by the config's rule (spec 3.5)."""
    array = np.asarray(ids, dtype=np.int64)
    if config.vision_experts is None:
        return np.zeros(array.shape, dtype=np.bool_)
    if config.vision_rule is VisionRule.FROM_IM_PATCH_ID:
        return array >= config.ids.image_patch
    first, *others = config.ids.vision
    found: npt.NDArray[np.bool_] = array == first
    for token in others:  # two or three ids: np.isin would sort
        found |= array == token
    return found
