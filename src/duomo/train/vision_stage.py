"""The dense vision stage: tower and resampler learn what lies in each cell, before any language.

Half of the pictures are boards full of digits, harder as the stage goes on; the rest are the scenes of the
tasks. A throw-away head on the resampler's output names kind and colour of what is centred in each 28-pixel
cell. Reading digits is the bottleneck of the whole model, and this is its cheapest supervision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duomo.model import Ernie
from duomo.processing.patches import FACTOR_PX, normalize, patchify
from duomo.processing.prompt import Grid
from duomo.tasks import Handwriting, digits, shapes

NUM_KINDS = 1 + 10 + len(shapes.KINDS)
NUM_COLOURS = 1 + len(shapes.COLOURS)

Array: TypeAlias = npt.NDArray[Any]
Labelled: TypeAlias = tuple[Array, Array, Array]  # picture, kind and colour of every cell


class CellHead(nn.Module):
    """Kind and colour of a cell, from its feature. Thrown away after the stage."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.kind = nn.Linear(hidden_size, NUM_KINDS)
        self.colour = nn.Linear(hidden_size, NUM_COLOURS)


@dataclass(slots=True)
class CellBatch:
    patches_PX: Array  # uint8
    grids: list[Grid]
    kinds_R: Array
    colours_R: Array


def cell_batch(
    rng: np.random.Generator, pool: Handwriting, batch_size: int, progress: float, min_spacing: float = 0.72
) -> CellBatch:
    """Pictures with a label for every cell; `progress` 0..1 makes the boards harder."""
    patches, grids, kinds, colours = [], [], [], []
    hardness = min(1.0, max(0.0, (progress - 0.05) / 0.4))
    canvas_px = digits.CANVASES_PX[int(rng.integers(len(digits.CANVASES_PX)))]
    for index in range(batch_size):
        choice = index % 10
        if choice < 4:
            picture, kind, colour = _board(rng, pool, hardness)
        elif choice < 8:
            picture, kind, colour = _line(rng, pool, canvas_px, min_spacing)
        else:
            picture, kind, colour = _scene(rng)
        rows, grid = patchify(picture)
        patches.append(rows)
        grids.append(grid)
        kinds.append(kind.reshape(-1))
        colours.append(colour.reshape(-1))
    # Equal grids side by side, so that the tower computes them as one batch.
    order = sorted(range(batch_size), key=lambda i: grids[i])
    return CellBatch(
        np.concatenate([patches[i] for i in order]),
        [grids[i] for i in order],
        np.concatenate([kinds[i] for i in order]),
        np.concatenate([colours[i] for i in order]),
    )


def _empty(height: int, width: int) -> tuple[Array, Array]:
    shape = (height // FACTOR_PX, width // FACTOR_PX)
    return np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)


def _board(rng: np.random.Generator, pool: Handwriting, hardness: float) -> Labelled:
    kind, colour = _empty(112, 112)
    ink = np.zeros((112, 112), dtype=np.float32)
    density = 1 - 0.5 * hardness * rng.random()
    for row, column in np.ndindex(4, 4):
        if rng.random() > density:
            continue
        digit = int(rng.integers(10))
        y, x = (28 * place + 14 + rng.uniform(-8, 8) * hardness for place in (row, column))
        size = 28 + rng.uniform(-5, 6) * hardness
        np.maximum(ink, digits.warp(rng, pool.draw(rng, digit), y, x, size, (112, 112), hardness), out=ink)
        kind[int(y) // FACTOR_PX, int(x) // FACTOR_PX] = 1 + digit
    return digits.colour(rng, ink), kind, colour


def _line(
    rng: np.random.Generator, pool: Handwriting, canvas_px: tuple[int, int], min_spacing: float
) -> Labelled:
    picture, placed = digits.draw_line(rng, pool, digits.draw_number(rng), canvas_px, min_spacing)
    kind, colour = _empty(*canvas_px)
    for digit, row, column in placed:
        kind[int(row) // FACTOR_PX, int(column) // FACTOR_PX] = 1 + digit
    return picture, kind, colour


def _scene(rng: np.random.Generator) -> Labelled:
    drawn = shapes.draw_scene(rng)
    kind, colour = _empty(112, 112)
    names = list(shapes.COLOURS)
    for shape in drawn:
        place = divmod(shape.cell, 4)
        kind[place] = 11 + shapes.KINDS.index(shape.kind)
        colour[place] = 1 + names.index(shape.colour)
    return shapes.draw(rng, drawn), kind, colour


def cell_loss(model: Ernie, head: CellHead, batch: CellBatch) -> tuple[Tensor, float]:
    """Cross-entropy of kinds and colours, and the share of occupied cells named rightly."""
    features_RD = model.encode(torch.from_numpy(normalize(batch.patches_PX)), batch.grids)
    kinds_R, colours_R = torch.from_numpy(batch.kinds_R), torch.from_numpy(batch.colours_R)
    kind_logits, colour_logits = head.kind(features_RD), head.colour(features_RD)
    loss = F.cross_entropy(kind_logits, kinds_R) + 0.5 * F.cross_entropy(colour_logits, colours_R)
    occupied = kinds_R > 0
    right = (kind_logits.argmax(-1) == kinds_R) & (colour_logits.argmax(-1) == colours_R)
    return loss, float((right & occupied).sum() / occupied.sum().clamp(min=1))
