"""What is asked in a benchmark: prompts of a given length, given prompts, and seeded pictures.

Synthetic text is random ids of the vocabulary, so that no prefix is shared by accident; pictures are noise,
the same for the same seed. Lengths are exact for text and stated for pictures.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from duomo.errors import ConfigError
from duomo.processing.messages import ImagePart, Message


@dataclass(frozen=True, slots=True)
class Workload:
    """`pictures` a request, of width x height; `prompts` in place of random words, in turn."""

    num_requests: int = 32
    input_tokens: int = 64
    output_tokens: int = 64
    pictures: int = 0
    picture_px: tuple[int, int] = (224, 224)
    prompts: tuple[str, ...] = ()
    seed: int = 0

    def ids(self, index: int, vocab_size: int) -> list[int]:
        """Request `index` as ids: any of the lower 9/10 of a vocabulary, where ordinary pieces are."""
        draw = random.Random(self.seed * 100_003 + index)
        return [draw.randrange(300, max(301, vocab_size * 9 // 10)) for _ in range(self.input_tokens)]

    def messages(self, index: int) -> list[Message]:
        """Request `index`, -1 for a warm-up, as a user's turn: its pictures, then its words."""
        parts = [_picture((self.seed, index + 1, i), *self.picture_px) for i in range(self.pictures)]
        words = self.prompts[index % len(self.prompts)] if self.prompts else _words(self, index)
        return [Message.of("user", *parts, words)]


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line. ConfigError if there is none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as prompts, one a line, in UTF-8") from error
    if not lines:
        raise ConfigError(f"{path} has no prompt; write one a line")
    return tuple(lines)


def _words(workload: Workload, index: int) -> str:
    draw = random.Random(workload.seed * 100_003 + index)
    return " ".join(str(draw.randrange(10, 100)) for _ in range(max(1, workload.input_tokens // 3)))


def _picture(seed: tuple[int, int, int], width: int, height: int) -> ImagePart:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return ImagePart(stream.getvalue())
