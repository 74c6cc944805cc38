"""The folders for trades hold recipes that the kit reads, and pages that match them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from duomo.tasks.families import FAMILIES
from duomo.train.settings import read_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
TRADES = ("weld", "slides", "charts")


@pytest.mark.parametrize("trade", TRADES)
def test_a_trades_recipe_and_page_agree(trade: str) -> None:
    reading = read_settings(EXAMPLES / trade / "recipe.yaml")
    assert not reading.warnings and reading.settings.lora is not None
    page = (EXAMPLES / trade / "README.md").read_text(encoding="utf-8")
    family, folder = re.findall(r"duomo\.tasks\.rows (\w+) (\S+)", page)[0]
    assert family in FAMILIES
    assert [*reading.settings.data, *reading.settings.eval_data] == [
        f"{folder}/train.jsonl",
        f"{folder}/unseen.jsonl",
    ]
    assert f"{trade}={reading.settings.output}/adapter" in page


def test_every_folder_is_tested() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()) == sorted(TRADES)
