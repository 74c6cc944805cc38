"""The folders for trades: recipes that the kit reads, and pages whose commands run, on few rows and steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from duomo.cli import main
from duomo.tasks.families import TRADES
from duomo.tasks.rows import write_rows
from duomo.train.settings import read_settings
from tests.conftest import made_up_pools

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("weld", "slides", "charts")


def page_of(trade: str) -> str:
    return (EXAMPLES / trade / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("trade", NAMES)
def test_a_trades_recipe_and_page_agree(trade: str) -> None:
    reading = read_settings(EXAMPLES / trade / "recipe.yaml")
    assert not reading.warnings and reading.settings.lora is not None
    name, folder = re.findall(r"duomo\.tasks\.rows (\w+) (\S+)", page_of(trade))[0]
    assert name in TRADES
    assert [*reading.settings.data, *reading.settings.eval_data] == [
        f"{folder}/train.jsonl",
        f"{folder}/unseen.jsonl",
    ]
    assert f"{trade}={reading.settings.output}/adapter" in page_of(trade)
    assert f"{reading.settings.steps} steps" in page_of(trade)


@pytest.mark.parametrize("trade", NAMES)
def test_a_pages_commands_run(trade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that write rows, judge and train; a server is started by tests/end_to_end."""
    block = re.findall(r"```sh\n(.*?)```", page_of(trade), flags=re.DOTALL)[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [command[:2] for command in commands if command[0] == "duomo"] == [
        ["duomo", "eval"], ["duomo", "train"], ["duomo", "eval"], ["duomo", "serve"],
    ]  # fmt: skip
    source, folder = commands[0][3:5]
    for split, part, num in (("train", "train", 8), ("test", "unseen", 6)):
        write_rows(source, made_up_pools(split), tmp_path / folder, part, num)  # type: ignore[arg-type]
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    for command in commands[1:-1]:
        few = {"train": ["steps=2", "eval_every=0", "tensorboard=false"], "eval": ["--json", "found.json"]}
        with pytest.raises(SystemExit) as ended:
            main([*command[1:], *few[command[1]]])
        assert ended.value.code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["num_samples"] == 6 and sum(num for num, _ in found["by_kind"].values()) == 6


def test_every_folder_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()) == sorted(NAMES)
