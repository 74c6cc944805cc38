"""An example: a picture, questions about it, and answers that are right by construction.

Splits cannot leak: pictures are made from disjoint pools of handwriting, and every other scene belongs to
the split that its canonical text hashes to, whatever the seed. A generator draws until the split fits.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Split = Literal["train", "dev", "test"]
Language = Literal["en", "zh"]
Pixels: TypeAlias = npt.NDArray[np.uint8]


class Mark(NamedTuple):
    """What lies at a pixel of the picture: dense supervision. `colour` only where one is named.

    `pair` counts a video's pairs of frames, which share their tokens.
    """

    label: str
    row: float
    column: float
    colour: str = ""
    pair: int = 0


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called in a turn; `parameters` are names of strings or numbers."""

    name: str
    parameters: tuple[str, ...]

    @property
    def schema(self) -> dict[str, object]:
        """The parameters as a JSON schema."""
        return {"type": "object", "properties": {name: {} for name in self.parameters}}


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer; `reasoning` is the thinking that leads to it, None without thinking.

    An answer may hold places (`<|LOC_120|>`), which become control tokens. With `functions` on offer the
    answer is the JSON of the call.
    """

    question: str
    answer: str
    reasoning: str | None = None
    kind: str = ""  # what is scored together: "digits/read", "shapes/count", ...
    functions: tuple[Function, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """`picture` is RGB [height, width, 3], a video's frames [F, height, width, 3], or None.

    `scene` names what was drawn, for the split; `times` are the seconds of a video's frames.
    """

    turns: tuple[Turn, ...]
    scene: str
    picture: Pixels | None = None
    marks: tuple[Mark, ...] = ()
    times: tuple[float, ...] = ()


def split_of(scene: str) -> Split:
    """90 % train, 5 % dev, 5 % test by a hash of the scene."""
    place = int.from_bytes(hashlib.blake2b(scene.encode(), digest_size=8).digest(), "big") % 100
    return "train" if place < 90 else "dev" if place < 95 else "test"


def any_language(rng: np.random.Generator) -> Language:
    return "en" if rng.random() < 0.5 else "zh"


def pick(rng: np.random.Generator, choices: list[str] | tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
