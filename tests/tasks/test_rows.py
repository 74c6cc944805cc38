"""Rows of a family are rows that the kit takes: picture, answer and thought in their places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.tasks.rows import commonest, row_of, write_rows
from duomo.tasks.scene import Turn
from duomo.train.rows import check_rows
from tests.conftest import made_up_pools


@pytest.mark.parametrize("family", ["surface", "nuclei", "charts", "text"])
def test_the_kit_takes_every_row(family: str, tmp_path: Path) -> None:
    path = write_rows(family, made_up_pools("train"), tmp_path, "train", 24)
    rows, problems = check_rows(path)
    assert len(rows) == 24 and not problems
    assert all(row.turns[-1].is_supervised and row.turns[-1].text for row in rows)
    assert all(bool(row.media) == (family != "text") for row in rows)
    assert any(row.turns[-1].reasoning for row in rows) and not all(row.turns[-1].reasoning for row in rows)


def test_the_commonest_answer_is_counted_by_kind_and_language(tmp_path: Path) -> None:
    turns = [Turn("How many?", a, kind="count") for a in ("1", "1", "2")] + [
        Turn("几个？", "2", kind="count")
    ]
    turns += [Turn("Sum?", "3", reasoning, "sum thinking") for reasoning in ("1+2=3", "2+1=3")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row_of(turn, None)) for turn in turns), encoding="utf-8")
    assert commonest(path) == {"count": 3 / 4, "sum thinking": 1 / 2}
