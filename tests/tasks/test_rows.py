"""Rows of a family are rows that the kit takes: picture, answer and thought in their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from duomo.tasks.rows import write_rows
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
