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
    positions = np.empty((3, num_tokens), dtype=np.int64)
    index = current = 0
    for span in spans:
        assert index <= span.start, "spans overlap"
        positions[:, index : span.start] = np.arange(current, current + span.start - index)
        current += span.start - index
        medium = _grid_positions(span.grid)
        index = span.start + medium.shape[1]
        assert index <= num_tokens, "a medium's span runs past the prompt"
        np.add(medium, current, out=positions[:, span.start : index])
        current += max(_token_grid(span.grid))
    positions[:, index:] = np.arange(current, current + num_tokens - index)
    return positions


def _token_grid(grid: GridLike) -> tuple[int, int, int]:
    """Tokens of one medium: 2x2 patches, and pairs of frames in a video."""
    return max(1, grid.frames // 2), grid.rows // 2, grid.columns // 2


def _grid_positions(grid: GridLike) -> Ints:
    """From zero on; frame-major, row-major."""
    frames, rows, columns = shape = _token_grid(grid)
    places = np.empty((3, *shape), dtype=np.int64)
    places[0] = np.arange(frames)[:, None, None]
    places[1] = np.arange(rows)[:, None]
    places[2] = np.arange(columns)
    return places.reshape(3, -1)


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
