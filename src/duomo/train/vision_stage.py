"""The dense vision stage: tower and resampler learn what lies in each cell, before any language.

Some of the pictures are boards full of digits, harder as the stage goes on; the rest are the pictures of the
tasks. A throw-away head on the resampler's output names what is centred in each 28-pixel cell and its colour,
and in stages that ask for it where the cell lies in the picture and where in the cell its centre is.
Reading is the bottleneck of the whole model, and this is its cheapest supervision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duomo.model import Ernie
from duomo.processing.patches import FACTOR_PX, normalize, patchify
from duomo.processing.prompt import Grid
from duomo.processing.video import stamp_frames
from duomo.tasks import Handwriting, digits
from duomo.tasks.families import COLOURS, FAMILIES, LABELS
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Mark, Pixels
from duomo.train.recipe import Stage

# Place 0 is "nothing here".
LABEL_INDEX = {label: index for index, label in enumerate(LABELS, start=1)}
MOST_CELLS = 8  # rows or columns of a picture
COLOUR_INDEX = {"": 0, **{colour: index for index, colour in enumerate(COLOURS, start=1)}}

Array: TypeAlias = npt.NDArray[Any]


class CellHead(nn.Module):
    """Kind, colour and place of a cell, from its feature. Thrown away after the stage.

    `place` is the cell's row and column from the picture's upper left, each out of MOST_CELLS; `offset` the
    row and column of what lies there, in cells from the cell's middle.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.kind = nn.Linear(hidden_size, 1 + len(LABELS))
        self.colour = nn.Linear(hidden_size, 1 + len(COLOURS))
        self.place = nn.Linear(hidden_size, 2 * MOST_CELLS)
        self.offset = nn.Linear(hidden_size, 2)


class CellLabels(NamedTuple):
    """Of every cell, pair of frames by pair. Kind and colour are 0 where nothing is centred."""

    kinds_R: Array
    colours_R: Array
    places_R2: Array
    offsets_R2: Array  # fp32; means nothing where nothing lies


@dataclass(slots=True)
class CellBatch:
    patches_PX: Array  # uint8
    grids: list[Grid]
    labels: CellLabels
    place_weight: float


def cell_batch(rng: np.random.Generator, pools: Pools, stage: Stage, progress: float) -> CellBatch:
    """Pictures with a label for every cell; `progress` 0..1 makes the boards harder."""
    hardness = min(1.0, max(0.0, (progress - 0.05) / 0.4)) if stage.is_eased else 1.0
    names, shares = zip(*stage.cells, strict=True)
    chosen = rng.choice(len(names), size=stage.batch_size, p=np.array(shares) / sum(shares))
    drawn = [_drawn(rng, pools, names[i], hardness, stage.min_spacing) for i in chosen]
    # Equal grids side by side, so that the tower computes them as one batch.
    drawn.sort(key=lambda pair: pair[0].shape)
    patches: list[Array] = []
    grids: list[Grid] = []
    labels: list[CellLabels] = []
    for picture, marks in drawn:
        rows, grid = patchify(picture)
        patches.append(rows)
        grids.append(grid)
        labels.append(cell_labels(picture, marks))
    found = CellLabels(*(np.concatenate(arrays) for arrays in zip(*labels, strict=True)))
    return CellBatch(np.concatenate(patches), grids, found, stage.place_weight)


def _drawn(
    rng: np.random.Generator, pools: Pools, name: str, hardness: float, min_spacing: float
) -> tuple[Pixels, tuple[Mark, ...]]:
    if name == "boards":
        return _board(rng, pools.handwriting, hardness)
    while True:
        if name == "digits":
            example = digits.generate(rng, pools.handwriting, num_turns=1, min_spacing=min_spacing)
        else:
            example = FAMILIES[name](rng, pools)
        if example.picture is not None and example.marks:  # some pictures (real slides) have no labelled cell
            return stamp_frames(example.picture, example.times), example.marks


def cell_labels(picture: Pixels, marks: tuple[Mark, ...]) -> CellLabels:
    pairs = picture.shape[0] // 2 if picture.ndim == 4 else 1
    shape = pairs, picture.shape[-3] // FACTOR_PX, picture.shape[-2] // FACTOR_PX
    kind, colour = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    places = np.moveaxis(np.indices(shape)[1:], 0, -1)
    offsets = np.zeros((*shape, 2), dtype=np.float32)
    for mark in marks:
        row, column = mark.row / FACTOR_PX, mark.column / FACTOR_PX
        place = mark.pair, int(row), int(column)
        kind[place], colour[place] = LABEL_INDEX[mark.label], COLOUR_INDEX[mark.colour]
        offsets[place] = row - int(row) - 0.5, column - int(column) - 0.5
    return CellLabels(kind.reshape(-1), colour.reshape(-1), places.reshape(-1, 2), offsets.reshape(-1, 2))


def _board(rng: np.random.Generator, pool: Handwriting, hardness: float) -> tuple[Pixels, tuple[Mark, ...]]:
    ink, marks = np.zeros((112, 112), dtype=np.float32), []
    density = 1 - 0.5 * hardness * rng.random()
    for row, column in np.ndindex(4, 4):
        if rng.random() > density:
            continue
        digit = int(rng.integers(10))
        y, x = (28 * place + 14 + rng.uniform(-8, 8) * hardness for place in (row, column))
        size = 28 + rng.uniform(-5, 6) * hardness
        np.maximum(ink, digits.warp(rng, pool.draw(rng, digit), y, x, size, (112, 112), hardness), out=ink)
        marks.append(Mark(f"digit {digit}", y, x))
    return digits.colour(rng, ink), tuple(marks)


def cell_loss(model: Ernie, head: CellHead, batch: CellBatch) -> tuple[Tensor, float]:
    """Cross-entropy of kinds and colours, and the share of occupied cells named rightly."""
    device = model.embed.weight.device
    features_RD = model.encode(torch.from_numpy(normalize(batch.patches_PX)).to(device), batch.grids)
    kinds_R, colours_R, places_R2, offsets_R2 = (torch.from_numpy(x).to(device) for x in batch.labels)
    kind_logits, colour_logits = head.kind(features_RD), head.colour(features_RD)
    loss = F.cross_entropy(kind_logits, kinds_R) + 0.5 * F.cross_entropy(colour_logits, colours_R)
    occupied = kinds_R > 0
    if batch.place_weight:
        place_logits = head.place(features_RD).unflatten(-1, (2, MOST_CELLS))
        misplaced = F.cross_entropy(place_logits.flatten(0, 1), places_R2.flatten())
        missed = F.smooth_l1_loss(head.offset(features_RD)[occupied], offsets_R2[occupied], beta=0.1)
        loss = loss + batch.place_weight * (misplaced + missed)
    right = (kind_logits.argmax(-1) == kinds_R) & (colour_logits.argmax(-1) == colours_R)
    return loss, float((right & occupied).sum() / occupied.sum().clamp(min=1))
