"""One to three real handwritten digits on a line: read them, add them, name the largest.

The number is drawn uniformly first, then written: each digit is a sample of its class, turned, slanted,
scaled and inked in its own colours. `draw_line` also says where each digit lies, for the dense stage.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from duomo.tasks.handwriting import Handwriting
from duomo.tasks.scene import Example, Language, Mark, Pixels, Turn, pick

CANVASES_PX = ((112, 112), (84, 112), (84, 84), (112, 140), (56, 112))  # height, width

READ = {
    "en": (
        "What number is written here?",
        "Read the digits.",
        "Which number do you see?",
        "What does the picture say?",
        "What is the number in this picture?",
        "What number is this?",
    ),
    "zh": (
        "图中写的是什么数字？",
        "读出图中的数字。",
        "这是什么数字？",
        "图片里的数字是多少？",
        "请读出数字。",
    ),
}
ADD = {
    "en": ("What is the sum of the digits?", "Add the digits.", "How much do the digits add up to?"),
    "zh": ("各位数字之和是多少？", "把这些数字加起来是多少？", "数字的和是多少？"),
}
LARGEST = {
    "en": ("Which digit is the largest?", "What is the largest digit?"),
    "zh": ("最大的数字是哪个？", "哪个数字最大？"),
}
HOW_MANY = {
    "en": ("How many digits are there?", "How many digits do you see?"),
    "zh": ("有几个数字？", "图中有多少个数字？"),
}


class Placed(NamedTuple):
    """A digit and the pixel of its centre."""

    digit: int
    row: float
    column: float


def draw_number(rng: np.random.Generator) -> list[int]:
    """One to three digits, every length equally often, every digit uniform."""
    return [int(d) for d in rng.integers(0, 10, size=int(rng.integers(1, 4)))]


def draw_line(
    rng: np.random.Generator,
    pool: Handwriting,
    digits: list[int],
    canvas_px: tuple[int, int],
    min_spacing: float = 0.72,
) -> tuple[Pixels, list[Placed]]:
    """Writes the digits from left to right somewhere on the canvas."""
    height, width = canvas_px
    size = min(rng.uniform(26, 38), (width - 4) / (0.8 * len(digits) + 0.2), height - 6.0)
    pitch = min(size * rng.uniform(min_spacing, 1.0), (width - size) / max(1, len(digits) - 1))
    span = pitch * (len(digits) - 1) + size
    left = rng.uniform(0, max(width - span, 0)) + size / 2
    middle = rng.uniform(size / 2, height - size / 2)
    ink = np.zeros((height, width), dtype=np.float32)
    placed = []
    for index, digit in enumerate(digits):
        row = float(np.clip(middle + rng.uniform(-3, 3), size / 2, height - size / 2))
        column = left + index * pitch
        np.maximum(ink, warp(rng, pool.draw(rng, digit), row, column, size, canvas_px), out=ink)
        placed.append(Placed(digit, row, column))
    return colour(rng, ink), placed


def warp(
    rng: np.random.Generator,
    sample: npt.NDArray[np.uint8],
    row: float,
    column: float,
    size: float,
    canvas_px: tuple[int, int],
    strength: float = 1.0,
) -> npt.NDArray[np.float32]:
    """Ink [height, width] in 0..1 of one 28x28 sample, turned and slanted, centred at (row, column)."""
    angle, slant = rng.uniform(-0.22, 0.22, size=2) * strength
    stretch = 1 + rng.uniform(-0.12, 0.12) * strength
    scale = 28 / size
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    a, b, d, e = cos * stretch, -sin + slant * scale, sin * stretch, cos
    offset_x, offset_y = 14 - a * column - b * row, 14 - d * column - e * row
    picture = Image.fromarray(sample).transform(
        (canvas_px[1], canvas_px[0]),
        Image.Transform.AFFINE,
        (a, b, offset_x, d, e, offset_y),
        Image.Resampling.BILINEAR,
    )
    return np.asarray(picture, dtype=np.float32) * np.float32(1 / 255)


def colour(rng: np.random.Generator, ink: npt.NDArray[np.float32]) -> Pixels:
    """Ink on paper in colours far enough apart, either way round, with a little noise."""
    light, dark = rng.uniform(150, 255, size=3), rng.uniform(0, 90, size=3)
    choice = rng.random()
    if choice < 0.35:
        light, dark = np.full(3, 255.0), np.full(3, float(rng.integers(0, 60)))
    paper, pen = (dark, light) if rng.random() < 0.25 else (light, dark)
    ink = np.clip(ink * rng.uniform(0.9, 1.4), 0, 1)[..., None]
    picture = paper * (1 - ink) + pen * ink + rng.normal(0, rng.uniform(0, 6), size=(*ink.shape[:2], 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def generate(
    rng: np.random.Generator,
    pool: Handwriting,
    canvas_px: tuple[int, int] | None = None,
    num_turns: int = 4,
    min_spacing: float = 0.72,
) -> Example:
    """A number and several questions about it, in both languages, with and without thinking."""
    digits = draw_number(rng)
    canvas_px = canvas_px or CANVASES_PX[int(rng.integers(len(CANVASES_PX)))]
    picture, placed = draw_line(rng, pool, digits, canvas_px, min_spacing)
    marks = tuple(Mark(f"digit {p.digit}", p.row, p.column) for p in placed)
    makers = [_read, _add, _add_thinking, _largest, _how_many]
    chosen = [_read, *(makers[i] for i in rng.choice(5, size=num_turns - 1, p=(0.3, 0.2, 0.3, 0.1, 0.1)))]
    turns = tuple(make(rng, digits, _language(rng)) for make in chosen)
    return Example(turns, f"digits {digits} on {canvas_px}", picture, marks)


def _language(rng: np.random.Generator) -> Language:
    return "en" if rng.random() < 0.5 else "zh"


def _read(rng: np.random.Generator, digits: list[int], language: Language) -> Turn:
    return Turn(pick(rng, READ[language]), "".join(map(str, digits)), kind="digits/read")


def _add(rng: np.random.Generator, digits: list[int], language: Language) -> Turn:
    return Turn(pick(rng, ADD[language]), str(sum(digits)), kind="digits/sum")


def _add_thinking(rng: np.random.Generator, digits: list[int], language: Language) -> Turn:
    return Turn(
        pick(rng, ADD[language]), str(sum(digits)), add_aloud(digits, language), "digits/sum thinking"
    )


def _largest(rng: np.random.Generator, digits: list[int], language: Language) -> Turn:
    return Turn(pick(rng, LARGEST[language]), str(max(digits)), kind="digits/largest")


def _how_many(rng: np.random.Generator, digits: list[int], language: Language) -> Turn:
    return Turn(pick(rng, HOW_MANY[language]), str(len(digits)), kind="digits/count")


def add_aloud(digits: list[int], language: Language) -> str:
    """The digits one by one, then every partial sum."""
    listed = ", ".join(map(str, digits)) if language == "en" else "、".join(map(str, digits))
    steps, total = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}")
        total += digit
    if language == "en":
        return f"The digits are {listed}." + (f" {', '.join(steps)}." if steps else f" The sum is {total}.")
    return f"数字是{listed}。" + (f"{'，'.join(steps)}。" if steps else f"和是{total}。")
