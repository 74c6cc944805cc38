"""A comparison that is cut short goes on with the rounds it has, and never with those of other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.bench import peers


def test_rounds_are_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def figures(name: str, value: float) -> dict[str, float]:
        asked.append(name)
        if len(asked) == 4:
            raise KeyboardInterrupt  # in the second round, after the peer's turn
        return dict.fromkeys(peers.ROWS.values(), value)

    monkeypatch.setattr(peers, "llama", lambda options: figures("llama", 2.0))
    monkeypatch.setattr(peers, "duomo", lambda options: figures("duomo", 3.0))
    file = tmp_path / "peers.json"
    given = [str(tmp_path / "28b"), "--llama", str(tmp_path), "--gguf", "m.gguf", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        peers.main([*given, "--rounds", "3"])
    assert len(json.loads(file.read_text())["duomo"]) == 1
    peers.main([*given, "--rounds", "3"])
    kept = json.loads(file.read_text())
    assert len(kept["duomo"]) == len(kept["llama.cpp"]) == 3 and asked[4:] == ["llama", "duomo"] * 2
    assert all(row["ratio"] == 1.5 for row in kept["summary"].values())
    peers.main([*given, "--rounds", "1", "--tokens", "8"])
    assert len(json.loads(file.read_text())["duomo"]) == 1
