"""An example: a picture, questions about it, and answers that are right by construction.

Splits cannot leak: pictures are made from disjoint pools of handwriting, and every other scene belongs to
the split that its canonical text hashes to, whatever the seed. A generator draws until the split fits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Split = Literal["train", "dev", "test"]
Language = Literal["en", "zh"]
Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer; `reasoning` is the thinking that leads to it, None without thinking."""

    question: str
    answer: str
    reasoning: str | None = None
    kind: str = ""  # what is scored together: "digits/read", "shapes/count", ...


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """`picture` is RGB [height, width, 3] or None; `scene` names what was drawn, for the split."""

    turns: tuple[Turn, ...]
    scene: str
    picture: Pixels | None = None


def split_of(scene: str) -> Split:
    """90 % train, 5 % dev, 5 % test by a hash of the scene."""
    place = int.from_bytes(hashlib.blake2b(scene.encode(), digest_size=8).digest(), "big") % 100
    return "train" if place < 90 else "dev" if place < 95 else "test"


def pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
