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
from duomo.checkpoints.pages import PAGE, Range, cached_bytes, drop, file_mappings, let_go, mapped_bytes
from duomo.checkpoints.pressure import is_short_of_memory
from duomo.checkpoints.residency import PRESSED_IDLE_S, Residency
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


def test_plain_tensors_lie_in_the_file_for_who_only_reads(tmp_path: Path) -> None:
    synthesize(CONFIG, tmp_path)

    def lies_in_a_file(tensor: torch.Tensor) -> bool:
        return any(each.start <= tensor.data_ptr() < each.stop for each in file_mappings())

    lent, own = load_model(tmp_path, is_read_only=True), load_model(tmp_path)
    for (name, theirs), ours in zip(lent.named_parameters(), own.parameters(), strict=True):
        assert torch.equal(theirs, ours), name
        assert not lies_in_a_file(ours), name
        assert lies_in_a_file(theirs) or (theirs.dim() == 2 and ".router." not in name), name  # unpacked ones
    with torch.no_grad():
        own.decoder.layers[1].mlp.text.router.bias.add_(1.0)  # training may


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


def test_routers_of_pictures_go_with_their_experts(tmp_path: Path) -> None:
    synthesize(CONFIG, tmp_path)
    model = load_model(tmp_path, is_read_only=True)
    residency, calls = Residency(model), []
    residency.after_letting_go = lambda: calls.append("now")
    routers = residency.pools["vision experts"].plain
    look(model)
    assert (mapped_bytes(routers) or 0) > 0
    before = model.logits(PICTURE, [Span(2, Grid(1, 4, 4))], torch.zeros(16, 588))
    residency.let_go_idle(0.0)
    assert mapped_bytes(routers) == 0
    residency.let_go_idle(0.0)
    assert calls == ["now"]
    assert torch.equal(before, model.logits(PICTURE, [Span(2, Grid(1, 4, 4))], torch.zeros(16, 588)))


def test_letting_go_changes_no_answer(model: Ernie) -> None:
    before = model.logits(TEXT)
    residency = Residency(model)
    residency.cap(0).close()
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


def test_gauges_ask_the_system_once_a_second(model: Ernie, monkeypatch: pytest.MonkeyPatch) -> None:
    from duomo.checkpoints import residency as module

    now, asked = [0.0], []
    residency = Residency(model, clock=lambda: now[0])
    monkeypatch.setattr(module, "mapped_bytes", lambda ranges: asked.append(ranges) or len(asked))
    first = residency.gauges()
    assert len(asked) == len(residency.pools) and residency.gauges() == first
    now[0] = module.HELD_S
    assert residency.gauges() != first and len(asked) == 2 * len(residency.pools)


def test_memory_outside_files_is_never_let_go() -> None:
    """Anonymous memory that is let go comes back as zeros: a copy of weights would be lost."""
    copy = np.full(8 * PAGE, 7, np.uint8)
    for give_up in (let_go, drop):
        give_up([Range.of(copy)])
        assert (copy == 7).all()


def test_short_memory_lets_idle_pools_go_sooner(model: Ernie) -> None:
    now, is_short = [0.0], [False]
    residency = Residency(model, clock=lambda: now[0], is_pressed=lambda: is_short[0])
    look(model)
    now[0] = PRESSED_IDLE_S
    assert residency.tidy(idle_s=300) == []
    is_short[0] = True
    assert set(residency.tidy(idle_s=300)) == set(VISION_PARTS)
    assert residency.gauges()["pools_let_go"] == 3
    assert resident(residency, "vision tower") == 0


@pytest.mark.parametrize(
    ("available_kb", "avg10", "expected"), [(8_000_000, "0.00", False), (400_000, "0.00", True),
                                            (8_000_000, "35.10", True)]
)  # fmt: skip
def test_what_counts_as_short(tmp_path: Path, available_kb: int, avg10: str, expected: bool) -> None:
    pressure = tmp_path / "proc/pressure/memory"
    pressure.parent.mkdir(parents=True)
    pressure.write_text(f"some avg10={avg10} avg60=0.00 avg300=0.00 total=9\nfull avg10=0.00 total=1\n")
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:   {available_kb} kB\n"
    )
    assert is_short_of_memory(tmp_path) is expected
    assert not is_short_of_memory(tmp_path / "nowhere")


def test_ranges_are_cut_to_whole_pages() -> None:
    array = np.zeros(3 * PAGE, np.uint8)
    base = -(-array.ctypes.data // PAGE) * PAGE
    piece = Range(base + 10, PAGE)
    assert piece.inner[1] == 0 and piece.outer == (base, 2 * PAGE)
    assert Range(base, PAGE).inner == Range(base, PAGE).outer == (base, PAGE)
    assert Range(base + 1, 2 * PAGE).inner == (base + PAGE, PAGE)


def test_advice_never_reaches_memory_that_was_written_or_belongs_to_another(tmp_path: Path) -> None:
    """A model that is gone must not have its old addresses given up: a library may lie there by now."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * PAGE))
    copied = np.memmap(path, np.uint8, mode="c")  # private and writable, as a library's data is
    copied[:] = 7
    let_go([Range.of(copied)])
    assert (copied == 7).all()  # pages given up would have come back as the file's zeros
    assert not any(each.start <= copied.ctypes.data < each.stop for each in file_mappings())

    mapped = np.memmap(path, np.uint8, mode="r")
    kept = Range.of(mapped)
    del mapped
    assert any(each.start <= kept.address < each.stop for each in file_mappings())  # nobody else can move in


def test_the_keeper_ends_with_the_engine(tmp_path: Path) -> None:
    from duomo.engine.engine import build_engine
    from duomo.engine.runner import ModelRunner
    from tests.engine.worlds import VOCABULARY

    synthesize(CONFIG, tmp_path)
    model = load_model(tmp_path)
    runner = ModelRunner(model, 8, 8)
    runner.residency = Residency(model)
    runner.residency.keep(300.0)
    engine = build_engine(runner, VOCABULARY, num_pages=8, page_size=8)
    keeper = runner.residency._keeper
    assert keeper is not None and keeper.is_alive()
    engine.close()
    assert not keeper.is_alive()
