"""A small world for experiments: the embedded model's sizes cut down, rows written to a folder, seeds.

Every experiment starts from random weights of this one config, so that a run is minutes on one thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from duomo.checkpoints import save_model
from duomo.checkpoints.load import load_config
from duomo.model import BankConfig, Ernie, ModelConfig, init_weights
from duomo.train.stages import EMBEDDED

Fields = dict[str, Any]


def small_config() -> ModelConfig:
    """0.9 million parameters with the embedded model's vocabulary: 3 layers of width 96, 8+8 experts."""
    config = load_config(EMBEDDED)
    assert config.vision is not None
    return replace(
        config,
        name="small",
        hidden_size=96,
        num_layers=3,
        num_heads=3,
        num_kv_heads=1,
        intermediate_size=192,
        expert_layers=(False, True, True),
        text_experts=BankConfig(8, 64),
        vision_experts=BankConfig(8, 32),
        shared_size=64,
        vision=replace(config.vision, num_layers=2, hidden_size=64, intermediate_size=128, num_heads=2),
        initializer_range=0.08,
    )


def small_checkpoint(folder: Path, seed: int) -> Path:
    """Random fp32 weights and the embedded model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(init_weights(Ernie(small_config()), seed), folder, torch.float32)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copyfile(EMBEDDED / name, folder / name)
    return folder


def write_rows(file: Path, rows: Sequence[Fields]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def write_result(file: Path | None, fields: Fields) -> None:
    """Prints the figures, and keeps them where asked."""
    text = json.dumps(fields, indent=1)
    print(text)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", encoding="utf-8")


def series(folder: Path, key: str) -> list[float]:
    """A series of metrics.jsonl, from its rows or their values."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [float(row[key] if key in row else row["values"][key]) for row in rows]
