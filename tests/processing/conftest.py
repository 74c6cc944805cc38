"""A small vocabulary with ERNIE's control tokens by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from duomo.processing.tokenizer import Tokenizer
from duomo.train.vocabulary import train_vocabulary

TEXTS = [
    "User: What is this? Picture 1: Video 2: what do you see in the picture?\nAssistant: A bird. A magpie.",
    "User: 2+2?\nAssistant: 4. Be brief. Thanks, and the time is 12:34. Feathers, I think.",
    "你好！请给我看一张图片，或者问我一个问题。喜鹊",
    "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.",
]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(TEXTS * 8, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary)
