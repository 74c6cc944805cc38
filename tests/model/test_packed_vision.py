"""The packed tower, end to end in a small model: against the same weights unpacked, and medium by medium."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from duomo import kernels
from duomo.kernels import reference
from duomo.model.packed import build_packed
from duomo.model.packed_vision import PackedVisionBlocks
from tests.model.test_packed import CONFIG, stored, unpacked

__all__ = ["stored"]  # the fixture


class Grid(NamedTuple):
    frames: int
    rows: int
    columns: int


PICTURE, WIDE, VIDEO = Grid(1, 6, 10), Grid(1, 4, 14), Grid(4, 4, 6)


def patches(*grids: Grid, seed: int = 0) -> torch.Tensor:
    count = sum(grid.frames * grid.rows * grid.columns for grid in grids)
    return torch.randn(count, 588, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model(stored):
    return build_packed(CONFIG, stored.items())


def test_the_tower_is_one_call(model, monkeypatch):
    assert isinstance(model.vision_tower.blocks, PackedVisionBlocks)
    calls = []
    blocks = kernels.vision_blocks
    monkeypatch.setattr(kernels, "vision_blocks", lambda *x: calls.append(x) or blocks(*x))
    with torch.inference_mode():
        model.vision_tower(patches(PICTURE), [PICTURE])
    assert len(calls) == 1


@pytest.mark.parametrize("grids", [[PICTURE], [PICTURE, WIDE], [VIDEO], [WIDE, VIDEO, PICTURE]])
def test_features_are_near_those_of_the_unpacked_tower(model, stored, grids):
    plain = unpacked(stored)
    with torch.inference_mode():
        packed, exact = model.encode(patches(*grids), grids), plain.encode(patches(*grids), grids)
    assert 0 < (packed - exact).norm() / exact.norm() < 0.05


def test_native_and_plain_kernels_give_the_same_features(model, monkeypatch):
    grids = [PICTURE, VIDEO]
    with torch.inference_mode():
        fast = model.vision_tower(patches(*grids), grids)
        monkeypatch.setattr(kernels, "vision_blocks", reference.vision_blocks)
        plain = model.vision_tower(patches(*grids), grids)
    assert (fast - plain).norm() / plain.norm() < 5e-3


def test_a_frame_does_not_see_the_other_frames(model):
    with torch.inference_mode():
        before = model.vision_tower(patches(VIDEO), [VIDEO]).unflatten(0, (4, -1))
        changed = patches(VIDEO).unflatten(0, (4, -1))
        changed[2] = 7.0
        after = model.vision_tower(changed.flatten(0, 1), [VIDEO]).unflatten(0, (4, -1))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False, True]


def test_an_adapter_inside_the_tower_is_heard(stored):
    """A module that stands in for a packed one has no packed weight: the blocks then run one by one."""
    model = build_packed(CONFIG, stored.items())
    block = model.vision_tower.blocks[0]
    with torch.inference_mode():
        fused = model.vision_tower(patches(PICTURE), [PICTURE])
        block.fc1 = nn.Sequential(block.fc1)
        same = model.vision_tower(patches(PICTURE), [PICTURE])
        block.fc1 = nn.Sequential(block.fc1, nn.Threshold(0.0, 0.0))
        other = model.vision_tower(patches(PICTURE), [PICTURE])
    assert (fused - same).norm() / same.norm() < 1e-2 < (other - same).norm() / same.norm()
