"""A small vocabulary and made-up handwriting: everything of a run but its length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import Handwriting, dialogue, digits, shapes
from duomo.train.vocabulary import train_vocabulary


@pytest.fixture(scope="session")
def pool() -> Handwriting:
    rng = np.random.default_rng(0)
    return Handwriting(tuple(rng.integers(0, 256, (10, 3, 28, 28)).astype(np.uint8)))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory, pool: Handwriting) -> Path:
    """A folder with the tokenizer.json of a vocabulary learnt from a few examples."""
    rng = np.random.default_rng(1)
    texts = []
    for _ in range(150):
        for example in (
            digits.generate(rng, pool, num_turns=2),
            shapes.generate(rng, "train", num_turns=2),
            dialogue.generate(rng, "train"),
        ):
            texts += [
                f"User: Picture 1:{t.question}\nAssistant: {t.reasoning}\n{t.answer}" for t in example.turns
            ]
    folder = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(texts, folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary)
