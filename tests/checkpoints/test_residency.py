"""Text never brings in vision weights; a picture does; idle ones go; a cap keeps the experts most used."""

from __future__ import annotations

import os
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.inventory import VISION_PARTS
from duomo.checkpoints.pages import PAGE, Range, cached_bytes, mapped_bytes
from duomo.checkpoints.residency import Residency
from duomo.model import BankConfig, Ernie, VisionConfig
from duomo.quant.synth import synthesize
from tests.tiny import TINY

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page counts are Linux's")

CONFIG = replace(
    TINY,
    hidden_size=256,
    num_heads=16,
    intermediate_size=256,
    text_experts=BankConfig(8, 256),
    vision_experts=BankConfig(8, 256),
    shared_size=256,
    vision=VisionConfig(num_layers=2, hidden_size=256, intermediate_size=1024, num_heads=4),
)
Grid = namedtuple("Grid", "frames rows columns")
Span = namedtuple("Span", "start grid")
TEXT = [1, 5, 9, 33, 71]
PICTURE = [1, 252, 250, 250, 250, 250, 253, 8]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ernie:
    synthesize(CONFIG, tmp_path)
    monkeypatch.setattr("duomo.checkpoints.load.VERIFY_BYTES", 0)  # as for a folder too large to verify
    model = load_model(tmp_path)
    for path in tmp_path.glob("*.safetensors"):  # out of the system's cache too, as after a reboot
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return model


def look(model: Ernie) -> None:
    patches = torch.zeros(16, 588)
    model.logits(PICTURE, [Span(2, Grid(1, 4, 4))], patches)


def resident(residency: Residency, part: str) -> int:
    found = residency.report()[part]["resident_bytes"]
    assert found is not None
    return int(found)


def test_text_never_touches_vision(model: Ernie) -> None:
    residency = Residency(model)
    for _ in range(3):
        model.logits(TEXT)
    assert resident(residency, "vision tower") == resident(residency, "resampler") == 0
    # Text and vision experts share a file a layer, and a fault maps up to 16 pages around it.
    assert resident(residency, "vision experts") <= 2 * 4 * 16 * PAGE
    assert resident(residency, "vision experts") < 0.25 * residency.pools["vision experts"].num_bytes
    for part in ("attention", "text experts", "shared experts"):
        assert resident(residency, part) > 0.4 * residency.pools[part].num_bytes, part


def test_a_picture_brings_them_in_and_idleness_lets_them_go(model: Ernie) -> None:
    now = [0.0]
    residency = Residency(model, clock=lambda: now[0])
    assert residency.let_go_idle(60) == []
    look(model)
    assert resident(residency, "vision tower") > 0.8 * residency.pools["vision tower"].num_bytes
    assert resident(residency, "vision experts") > 0
    now[0] = 59
    assert residency.let_go_idle(60) == []
    now[0] = 61
    assert set(residency.let_go_idle(60)) == set(VISION_PARTS)
    assert all(resident(residency, part) == 0 for part in VISION_PARTS)
    assert residency.let_go_idle(60) == []


def test_letting_go_changes_no_answer(model: Ernie) -> None:
    before = model.logits(TEXT)
    residency = Residency(model)
    assert residency.enforce_cap(0) > 0
    assert resident(residency, "text experts") < 0.05 * residency.pools["text experts"].num_bytes
    assert torch.equal(before, model.logits(TEXT))


def test_a_picture_is_read_ahead(model: Ernie) -> None:
    residency = Residency(model)
    pools = [residency.pools[part] for part in VISION_PARTS]
    total = sum(pool.num_bytes for pool in pools)
    before = sum(cached_bytes(pool.ranges) or 0 for pool in pools)
    residency.expect_picture()
    for _ in range(100):
        cached = sum(cached_bytes(pool.ranges) or 0 for pool in pools)
        if cached > 0.9 * total:
            break
        time.sleep(0.05)
    assert cached > 0.9 * total >= before
    assert residency.report()["vision tower"]["idle_s"] is not None


def test_a_cap_keeps_the_experts_most_used(model: Ernie) -> None:
    residency = Residency(model)
    for start in range(0, 60, 5):
        model.logits(list(range(start + 1, start + 9)))
    counts = residency.routing_counts()["decoder.layers.1.mlp.text"]
    assert sum(counts) == 12 * 8 * CONFIG.num_chosen
    held = sum(int(row["resident_bytes"] or 0) for row in residency.report().values())
    expert = 3 * 256 * 256 // 4
    freed = residency.enforce_cap(held - 3 * expert)
    assert 3 * expert <= freed + 8 * PAGE <= 5 * expert
    all_counts = [count for bank in residency.routing_counts().values() for count in bank]
    ranked = sorted(residency._experts(), key=lambda item: item[0])
    assert mapped_bytes(ranked[-1][1]), "the most used expert stays"
    gone = [count for count, ranges in ranked if not mapped_bytes(ranges)]
    assert max(gone) <= sorted(all_counts)[len(gone)]


def test_ranges_are_cut_to_whole_pages() -> None:
    array = np.zeros(3 * PAGE, np.uint8)
    base = -(-array.ctypes.data // PAGE) * PAGE
    piece = Range(base + 10, PAGE)
    assert piece.inner[1] == 0 and piece.outer == (base, 2 * PAGE)
    assert Range(base, PAGE).inner == Range(base, PAGE).outer == (base, PAGE)
    assert Range(base + 1, 2 * PAGE).inner == (base + PAGE, PAGE)
