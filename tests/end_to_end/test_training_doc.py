"""docs/training.md, run: its recipe, every command in order, its Python, in a folder with a few rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from duomo.cli import main

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, flags=re.DOTALL)


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("training")
    (recipe,) = blocks("yaml")
    (home / "recipe.yaml").write_text(recipe)
    sums = [{"src": [f"{a} + {b} ="], "tgt": [str(a + b)]} for a in range(4) for b in range(4)]
    write(home / "rows.jsonl", sums)
    write(home / "unseen.jsonl", sums[:4])
    write(home / "pairs.jsonl", [{"question": "hi", "chosen": "Hello.", "rejected": "Go away."}] * 3)
    Image.new("RGB", (112, 112), "red").save(home / "red.png")
    write(
        home / "pictures.jsonl", [{"query": "<image>Colour?", "response": "red", "images": ["red.png"]}] * 3
    )
    return home


def run(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A command as the shell would split it, in this process: the verbs are the same and torch loads once."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line)[1:])
    said = capsys.readouterr()
    assert ended.value.code == 0, f"{line}\n{said.err}"
    return said.out


def test_every_command_and_the_python(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, since later commands use what earlier ones wrote."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("duomo ")]
    assert len(lines) >= 12
    monkeypatch.chdir(folder)
    said = {line: run(line, capsys) for line in lines}
    (preview,) = (text for line, text in said.items() if "preview" in line)
    assert "[[0</s>]]" in preview and "best_fit" in preview
    (plan,) = (text for line, text in said.items() if line.startswith("duomo plan"))
    assert "vision_routers: 5 tensors" in plan and "memory in all" in plan
    attached, merged = (
        re.search(r"loss [\d.]+, .*", text)[0]  # type: ignore[index]
        for line, text in said.items()
        if line.startswith("duomo eval")
    )
    assert attached == merged  # the adapter and the weights it was folded into, on the same rows
    for name in ("run/checkpoint", "experts/checkpoint", "lora/adapter", "dpo/checkpoint", "grpo/checkpoint"):
        assert list((folder / name).glob("*.safetensors")), name
    (program,) = blocks("python")
    exec(program, {})
    assert "python/checkpoint" in capsys.readouterr().out
