"""A small vocabulary and made-up handwriting: everything of a run but its length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import Handwriting, dialogue, digits, shapes
from duomo.tasks.pools import FONTS, Pools
from duomo.tasks.scene import Split
from duomo.train.vocabulary import train_vocabulary


@pytest.fixture(scope="session")
def pool() -> Handwriting:
    rng = np.random.default_rng(0)
    return Handwriting(tuple(rng.integers(0, 256, (10, 3, 28, 28)).astype(np.uint8)))


def made_up_pools(split: Split) -> Pools:
    """Noise of every sort a generator draws from, other noise for every split; the fonts are real."""
    rng = np.random.default_rng(["train", "dev", "test"].index(split))

    def noise(*shape: int) -> np.ndarray:  # type: ignore[type-arg]
        return rng.integers(0, 256, shape).astype(np.uint8)

    return Pools(
        split,
        Handwriting(tuple(noise(10, 3, 28, 28))),
        noise(5, 28, 28),
        (noise(96, 96), noise(96, 96)),
        noise(160, 160, 3),
        rng.uniform(0, 0.06, (160, 160, 2)).astype(np.float32),
        FONTS[split],
    )


@pytest.fixture(scope="session")
def pools() -> Pools:
    return made_up_pools("train")


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
