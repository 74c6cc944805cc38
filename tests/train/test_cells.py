"""What the dense stage is taught: label, colour and place of every cell, a video by pairs of frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import clips
from duomo.tasks.scene import Example, Mark
from duomo.train.recipe import Recipe
from duomo.train.run import build_head, build_model
from duomo.train.vision_stage import COLOUR_INDEX, LABEL_INDEX, cell_batch, cell_labels, cell_loss
from tests.conftest import made_up_pools


def test_labels_of_cells() -> None:
    marks = (Mark("digit 3", 14.0, 30.0), Mark("shape star", 41.0, 70.0, "red"))
    kind, colour, places, offsets = cell_labels(np.zeros((56, 84, 3), np.uint8), marks)
    assert kind.reshape(2, 3).tolist() == [[0, LABEL_INDEX["digit 3"], 0], [0, 0, LABEL_INDEX["shape star"]]]
    assert colour.reshape(2, 3)[1, 2] == COLOUR_INDEX["red"] and np.count_nonzero(colour) == 1
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert np.allclose(offsets[1], (0.0, 30 / 28 - 1.5)) and np.allclose(offsets[5], (41 / 28 - 1.5, 0.0))


def sprites_of(example: Example, pair: int) -> list[Mark]:
    return [mark for mark in example.marks if mark.pair == pair and mark.label.startswith("sprite")]


def test_marks_of_clips_lie_where_something_is() -> None:
    """In the frames that they name, and nowhere where every frame is empty."""
    rng, pools = np.random.default_rng(4), made_up_pools("train")
    seen = set()
    for _ in range(60):
        example = clips.generate(rng, pools)
        assert example.picture is not None
        frames = example.picture.astype(int)
        paper = frames[0, 0, 0]
        for pair in range(len(frames) // 2):
            is_drawn = [bool((frames[i] != paper).any()) for i in (2 * pair, 2 * pair + 1)]
            marks = sprites_of(example, pair)
            assert bool(marks) == any(is_drawn)
            for mark in marks:
                when = mark.label.removeprefix("sprite ")
                seen.add(when)
                for i, name in ((2 * pair, "before"), (2 * pair + 1, "after")):
                    row, column = round(mark.row), round(mark.column)
                    near = frames[i, max(row - 14, 0) : row + 14, max(column - 14, 0) : column + 14]
                    assert when not in (name, "both") or (near != paper).any()
            (time,) = (mark for mark in example.marks if mark.pair == pair and mark.label.startswith("time"))
            assert time.label == f"time {round(2 * example.times[2 * pair])}"
    assert seen == {"before", "after", "both"}


@pytest.mark.parametrize("name", ["places", "clips"])
def test_a_stage_that_asks_for_places_teaches_them(name: str, tokenizer: Tokenizer) -> None:
    stage = replace(Recipe().stages[-1], cells=((name, 1.0),), batch_size=4, place_weight=0.5)
    batch = cell_batch(np.random.default_rng(2), made_up_pools("train"), stage, 1.0)
    num_cells = sum(grid.num_tokens for grid in batch.grids)
    assert all(len(array) == num_cells for array in batch.labels)
    model = build_model(tokenizer, 5)
    head = build_head(model)
    with_places = float(cell_loss(model, head, batch)[0].detach())
    without = float(cell_loss(model, head, replace(batch, place_weight=0.0))[0].detach())
    assert with_places > without
    cell_loss(model, head, batch)[0].backward()
    for layer in (head.place, head.offset):
        assert layer.weight.grad is not None and float(layer.weight.grad.abs().sum()) > 0
    with torch.no_grad():  # a head that knows where things lie pays for their names alone
        rows = torch.arange(2 * 8) % 8
        head.place.weight.zero_()
        head.place.bias.copy_(-100.0 * rows)
        only_first = replace(
            batch,
            labels=batch.labels._replace(
                places_R2=np.zeros_like(batch.labels.places_R2),
                offsets_R2=np.full_like(batch.labels.offsets_R2, 0.25),
            ),
        )
        head.offset.weight.zero_()
        head.offset.bias.fill_(0.25)
        known = float(cell_loss(model, head, only_first)[0])
        assert abs(known - float(cell_loss(model, head, replace(only_first, place_weight=0.0))[0])) < 1e-6
