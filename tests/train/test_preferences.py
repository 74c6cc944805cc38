"""A toy preference from the outside: DPO and its relatives make the chosen answer likelier than before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from duomo.train.loop import finetune

WORDS = ("even", "odd")
PAIRS = [{"question": f"number {n}?", "chosen": WORDS[n % 2], "rejected": WORDS[1 - n % 2]} for n in range(8)]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "kto_pair"])
def test_the_preferred_answer_wins(loss: str, checkpoint: Path, tmp_path: Path) -> None:
    """Right means: the pair's margin over the reference is above zero. It is zero before the first step."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    fields = {
        "stage": "dpo", "model": str(checkpoint), "data": str(data), "output": str(tmp_path / "run"),
        "steps": 30, "rate": 1e-3, "schedule": "constant", "weight_decay": 0.0, "report_every": 1,
        "tensorboard": False, "save_every": 1000, "preference": {"loss": loss},
    }  # fmt: skip
    finetune(fields, say=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["accuracy"] <= 0.5 and rows[-1]["accuracy"] == 1.0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["values"]["margin"] > 1.0
