"""What is set from the memory there is, and what is refused: arithmetic, against the 28B's own sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duomo.checkpoints import save_model, settings
from duomo.checkpoints.fit import PROCESS_BYTES, fit_gpu
from duomo.checkpoints.inventory import Inventory
from duomo.checkpoints.settings import settle
from duomo.cli import main
from duomo.errors import CheckpointError
from duomo.llm import LLM
from duomo.model import preset
from duomo.serve.options import Options
from duomo.serve.run import serve
from tests.checkpoints.test_fit import planned
from tests.engine.checkpoint import write_checkpoint
from tests.tiny import TINY, tiny_model

GB = 10**9
KV = 4096 * 57_344  # of a usual context


@pytest.fixture(scope="module")
def big() -> Inventory:
    return planned(preset("vl-28b-a3b"))


def test_all_of_it_fits_a_laptop(big: Inventory) -> None:
    found = settle(big, 16 * GB)
    assert found.weights_cap_bytes is None
    assert KV < found.kv_bytes <= 4 * GB
    assert found.kv_bytes + big.total.num_bytes + PROCESS_BYTES <= 16 * GB
    assert 1 < found.max_sequences <= 64


def test_what_was_asked_for_is_kept(big: Inventory) -> None:
    found = settle(big, 16 * GB, kv_bytes=300 << 20, max_sequences=3)
    assert found.kv_bytes == 300 << 20 and found.max_sequences == 3


def test_a_small_ram_caps_the_weights(big: Inventory) -> None:
    for ram in (5 * GB, 8 * GB):  # 8 GB hold all text, but not the pictures' weights beside it
        found = settle(big, ram)
        assert found.weights_cap_bytes == ram - PROCESS_BYTES - KV and found.kv_bytes == KV


def test_what_no_token_could_use_is_refused(big: Inventory) -> None:
    with pytest.raises(CheckpointError, match=r"2\.0 GB are allowed"):
        settle(big, 2 * GB)
    with pytest.raises(CheckpointError, match="give more"):
        settle(replace(big, layout="paddle"), 5 * GB)


def test_nobody_reads_from_disk_unasked(big: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "available_bytes", lambda: (5 * GB, 8 * GB))
    with pytest.raises(CheckpointError, match=r"5\.0 GB are available: --ram says"):
        settle(big)
    assert settle(big, 5 * GB).weights_cap_bytes is not None


def test_a_gpu_holds_what_tokens_read_most(big: Inventory) -> None:
    small, large = fit_gpu(big, 4 * GB), fit_gpu(big, 24 * GB)
    assert large.left_bytes == 0 and large.longest_context_tokens > 100_000
    assert small.held["attention"] == big.num_bytes("attention")
    assert 0 < small.held["text experts"] < big.num_bytes("text experts")
    assert "vision experts" not in small.held
    assert sum(small.held.values()) + small.left_bytes == big.total.num_bytes
    assert sum(small.held.values()) + PROCESS_BYTES + KV <= 4 * GB


def test_every_door_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="text alone needs"):
        LLM.open(tmp_path, ram_bytes=100 << 20)
    with pytest.raises(CheckpointError, match="text alone needs"):
        serve(["--model", str(tmp_path), "--ram", "100M"])
    with pytest.raises(SystemExit) as stopped:
        main(["ask", "hello", "--model", str(tmp_path), "--ram", "100M"])
    said = capsys.readouterr().err
    assert stopped.value.code and said.count("\n") == 1 and "0.1 GB are allowed" in said


def test_plan_counts_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_model(TINY), tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", str(tmp_path), "--ram", "2G", "--gpu", "1G", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["gpu"]["left_in_memory_bytes"] == 0 and facts["resident_bytes"]["text"] > 0


def test_pages_follow_from_memory(tmp_path: Path) -> None:
    assert Options().kv_mb is None
    with LLM.open(write_checkpoint(tmp_path), ram_bytes=2 * GB) as llm:
        assert llm.stats()["pages"] * 16 >= 4096
