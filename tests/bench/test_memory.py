"""The benchmarks of memory and steps run on a small packed checkpoint; what they count is what happened."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from duomo import _native
from duomo.bench import cap, decode, decode_ablation, first_token, memory, session
from duomo.checkpoints import load_model
from duomo.checkpoints.inventory import VISION_PARTS, take_inventory
from duomo.model import BankConfig, SpecialIds
from duomo.quant.synth import synthesize
from tests.checkpoints.test_residency import CONFIG as SMALL

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page counts are Linux's")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = SpecialIds(
        image_patch=5000, video_patch=5000, image_start=5400, image_end=5401, video_start=5402, video_end=5403
    )
    bank = BankConfig(8, 512)
    path = tmp_path_factory.mktemp("packed")
    config = replace(SMALL, vocab_size=5600, ids=ids, text_experts=bank, vision_experts=bank, shared_size=512)
    synthesize(config, path)
    return path


def test_steps_show_the_picture_come_and_go(folder: Path) -> None:
    steps = memory.run(folder, context=64, side_px=112)["steps"]
    held = [step["pools"] for step in steps]
    assert held[1]["vision tower"] == 0 < held[2]["vision tower"]
    assert held[4]["vision tower"] == held[4]["resampler"] == 0
    assert all(step["own_bytes"] > 0 for step in steps)


def test_a_second_question_does_no_vision_work(folder: Path) -> None:
    found = first_token.second_question(folder, side_px=112, repeats=1)
    assert found["media_encoded_again"] == 0 and found["ratio"] > 0


def test_the_cap_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = take_inventory(folder)
    text = inventory.total.num_bytes - inventory.num_bytes(*VISION_PARTS)
    monkeypatch.setattr(cap, "weights_cap", lambda *asked: text - inventory.num_bytes("text experts") // 2)
    found = cap.measure(folder, 1, num_tokens=12, warm_up=4)
    assert found["expert_misses"] > 0 and 0 < found["hit_rate"] < 1
    assert found["beside_a_prompt"]["longest_gap_ms"] > 0


def test_a_session_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "IDLE_S", 0.1)
    monkeypatch.setattr(session.time, "sleep", lambda seconds: None)
    found = session.run(folder, side_px=112, text_tokens=32)
    assert [what for _, what in found["events"]] == ["text", "a picture arrives", "idle", "text again"]


def test_a_step_is_its_rows_one_decoder_and_one_head(folder: Path) -> None:
    before = _native.Decoder.run
    found = decode.profile(decode.Streams(load_model(folder), 1, 8, "float32"), 2)
    assert set(found["native_ms_a_step"]) == {"Integers.rows", "Decoder.run", "Integers.linear"}
    assert 0 < sum(found["native_ms_a_step"].values()) <= found["ms_a_step"] * 1.001
    assert 0 <= found["share_outside_native"] < 1
    assert _native.Decoder.run is before  # nothing is left wrapped


def test_an_ablation_changes_one_thing_at_a_time_and_leaves_nothing(folder: Path) -> None:
    before = _native.current_isa(), _native.num_threads()
    found = decode_ablation.run(folder, prompt=8, rounds=1, steps=2)
    assert (_native.current_isa(), _native.num_threads()) == before
    assert set(found["rows"]) == set(found["steps_ms"]) == set(decode_ablation.VARIANTS)
    assert found["rows"][decode_ablation.FULL]["ratio"] == 1
    parts = {"Integers.rows", "Decoder.run", "Integers.linear", "outside native calls"}
    assert set(found["parts_ms"]) == parts
    model = load_model(folder)
    with decode_ablation.layer_by_layer(model):
        stream = decode.Streams(model, 1, 8, "bfloat16")
        assert "Decoder.run" not in decode.profile(stream, 1)["native_ms_a_step"]
    assert "Decoder.run" in decode.profile(stream, 1)["native_ms_a_step"]


def test_lengths_of_context_take_turns(folder: Path) -> None:
    found = decode_ablation.by_context(folder, [8, 40], rounds=2, steps=3)
    assert [len(row["steps_ms"]) for row in found.values()] == [6, 6] and list(found) == ["8", "40"]
