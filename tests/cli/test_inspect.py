"""`duomo inspect`: sizes that add up, in every layout, and one line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.checkpoints import save_model
from duomo.checkpoints.inventory import PARTS, part_of, take_inventory
from duomo.cli import main
from tests.tiny import TINY, TINY_DENSE, tiny_model


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    return int(stopped.value.code or 0)


def test_parts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(TINY)
    save_model(model, tmp_path)
    assert run(str(tmp_path), "--json") == 0
    parts = json.loads(capsys.readouterr().out)["parts"]
    total = parts.pop("total")
    assert total["parameters"] == sum(p.numel() for p in model.parameters())
    assert total["parameters"] == sum(part["parameters"] for part in parts.values())
    assert total["bytes"] == 4 * total["parameters"] and total["bits_per_weight"] == 32
    assert parts["text experts"]["parameters"] == 2 * 8 * 3 * 48 * 64
    assert parts["vision experts"]["parameters"] == 2 * 8 * 3 * 16 * 64
    assert parts["routers"]["parameters"] == 2 * 2 * (8 * 64 + 8)
    assert list(parts) == [part for part in PARTS if part in parts] and "head" not in parts


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    save_model(tiny_model(TINY_DENSE), tmp_path)
    assert list(take_inventory(tmp_path).parts) == ["dense MLP", "attention", "embeddings", "norms"]


def test_every_parameter_has_its_part() -> None:
    named = {name: part_of(name) for name, _ in tiny_model(TINY).named_parameters()}
    assert named["decoder.layers.0.mlp.gate.weight"] == "dense MLP"
    assert named["decoder.layers.1.mlp.shared.down.weight"] == "shared experts"
    assert named["decoder.layers.1.post_norm.weight"] == "norms"
    assert named["decoder.norm.weight"] == "norms"


def test_the_table_is_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_model(TINY), tmp_path)
    assert run(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "PT layout" in out and "text experts" in out and "total" in out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny_model(TINY), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for path in (tmp_path, tmp_path / "nothing", weights):
        assert run(str(path)) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("duomo: ") and captured.err.count("\n") == 1
        assert "Traceback" not in captured.err and captured.out == ""
