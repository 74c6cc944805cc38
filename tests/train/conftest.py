"""A small checkpoint and rows to train on: real files, in milliseconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from duomo.checkpoints import save_model
from duomo.processing.tokenizer import Tokenizer
from duomo.train.recipe import special_ids
from tests.tiny import TINY, tiny_model


@pytest.fixture(scope="session")
def checkpoint(vocabulary: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of the test model's sizes: 0.5 million random fp32 weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = replace(TINY, vocab_size=tokenizer.vocab_size, ids=special_ids(tokenizer))
    save_model(tiny_model(config), folder, torch.float32)
    shutil.copy(vocabulary / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def text_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 sums, in rows of different lengths."""
    file = tmp_path_factory.mktemp("rows") / "text.jsonl"
    rows = [
        {"src": [f"{a} + {b} =" + " please" * (a % 3)], "tgt": [str(a + b)]}
        for a in range(5)
        for b in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def picture_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of one colour with a question each, beside their rows."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index, colour in enumerate(("red", "blue", "green", "black", "white", "yellow")):
        size = (56, 56) if index % 2 else (84, 56)
        Image.new("RGB", size, colour).save(folder / f"{colour}.png")
        rows.append({"query": "<image>Which colour?", "response": colour, "images": [f"{colour}.png"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "rows.jsonl"
