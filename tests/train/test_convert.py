"""What is written reads back as the same rows; what a spelling cannot say is refused by line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from duomo.errors import TrainingError
from duomo.train.convert import convert_file
from duomo.train.rows import Row, read_rows
from tests.train.test_rows import GOOD

TOOLS = {
    "messages": [
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]},
        {"role": "tool", "content": "18"},
        {"role": "assistant", "content": "<think>\n18\n</think>\n18 degrees"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
}  # fmt: skip


def rows_of(file: Path) -> list[Row]:
    return [replace(row, source="") for row in read_rows(file)]


@pytest.mark.parametrize("kind", ["messages", "erniekit"])
def test_converted_rows_are_the_same_rows(kind: str, tmp_path: Path) -> None:
    good = [*GOOD.values(), *([TOOLS] if kind == "messages" else [])]
    file, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in good))
    assert convert_file(file, target, kind) == len(good)
    assert rows_of(target) == rows_of(file)


def test_what_cannot_be_said_or_done_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps(GOOD["ernie"]) + "\n" + json.dumps(TOOLS) + "\n")
    with pytest.raises(TrainingError, match=r"in\.jsonl:2: tool calls"):
        convert_file(file, tmp_path / "out.jsonl", "erniekit")
    with pytest.raises(TrainingError, match="is the file that is read"):
        convert_file(file, file, "messages")
    with pytest.raises(TrainingError, match="no format"):
        convert_file(file, tmp_path / "out.jsonl", "parquet")
