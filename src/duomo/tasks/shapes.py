"""Coloured shapes: name one, name its colour, count them all or those of one colour or kind.

The answer of a counting question is drawn uniformly first and the scene built around it, so that no
answer can be guessed from how often it occurs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from duomo.tasks.scene import Example, Language, Mark, Pixels, Split, Turn, pick, split_of

KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (30, 150, 60),
    "blue": (35, 80, 210),
    "yellow": (240, 200, 20),
    "purple": (130, 50, 170),
    "orange": (245, 130, 20),
}
ZH = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
}
MAX_SHAPES = 6
NAME = {
    "en": ("What shape is this?", "What do you see?", "Name the shape and its colour."),
    "zh": ("这是什么形状？", "图中是什么？", "说出形状和颜色。"),
}
COLOUR = {
    "en": ("What colour is the shape?", "Which colour is it?"),
    "zh": ("这个形状是什么颜色？", "它是什么颜色？"),
}
COUNT_ALL = {
    "en": ("How many shapes are there?", "Count the shapes."),
    "zh": ("有几个形状？", "图中一共有多少个形状？"),
}


class Shape(NamedTuple):
    """A kind and a colour, by name, and the cell of the 4x4 board it lies in."""

    kind: str
    colour: str
    cell: int


def generate(rng: np.random.Generator, split: Split, num_turns: int = 4) -> Example:
    """A scene of the asked split with several questions, in both languages, with and without thinking."""
    while True:
        shapes = draw_scene(rng)
        scene = "shapes " + " ".join(sorted(f"{s.colour}-{s.kind}@{s.cell}" for s in shapes))
        if split_of(scene) == split:
            break
    makers = (
        (_name, _colour)
        if len(shapes) == 1 and rng.random() < 0.85
        else (_count, _count_thinking, _count_all)
    )
    turns = tuple(
        makers[int(rng.integers(len(makers)))](rng, shapes, "en" if rng.random() < 0.5 else "zh")
        for _ in range(num_turns)
    )
    return Example(turns, scene, draw(rng, shapes), marks_of(shapes))


def draw_scene(rng: np.random.Generator) -> list[Shape]:
    count = 1 if rng.random() < 0.35 else int(rng.integers(1, MAX_SHAPES + 1))
    cells = rng.choice(16, size=count, replace=False)
    # Few kinds and colours in one scene, so that a question about one of them has every count.
    kinds = rng.choice(KINDS, size=min(2, count) if rng.random() < 0.6 else count)
    colours = rng.choice(list(COLOURS), size=min(2, count) if rng.random() < 0.6 else count)
    return sorted(
        (Shape(str(rng.choice(kinds)), str(rng.choice(colours)), int(cell)) for cell in cells),
        key=lambda s: s.cell,
    )


def draw(rng: np.random.Generator, shapes: list[Shape]) -> Pixels:
    """The scene at 112x112, drawn at three times the size and reduced, so that edges are smooth."""
    paper = tuple(int(v) for v in rng.uniform(225, 256, size=3))
    picture = Image.new("RGB", (336, 336), paper)
    pen = ImageDraw.Draw(picture)
    for shape in shapes:
        radius = rng.uniform(8, 12.5) * 3
        row, column = (84 * place + 42 + rng.uniform(-4, 4) * 3 for place in divmod(shape.cell, 4))
        tint = tuple(int(np.clip(c + rng.uniform(-18, 18), 0, 255)) for c in COLOURS[shape.colour])
        draw_shape(pen, shape.kind, column, row, radius, rng.uniform(-0.2, 0.2), tint)
    return np.asarray(picture.resize((112, 112), Image.Resampling.BOX))


def draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, turn: float, fill: tuple[int, ...]
) -> None:
    if kind == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    if kind == "ring":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=fill, width=round(radius * 0.4))
        return
    corners = {
        "square": [(1.0, math.pi / 4 + math.pi / 2 * i) for i in range(4)],
        "diamond": [(1.15 if i % 2 else 0.7, math.pi / 2 * i) for i in range(4)],
        "triangle": [(1.1, -math.pi / 2 + math.pi * 2 / 3 * i) for i in range(3)],
        "star": [(1.15 if i % 2 == 0 else 0.45, -math.pi / 2 + math.pi / 5 * i) for i in range(10)],
        "cross": [
            (math.hypot(u, v), math.atan2(v, u))
            for u, v in (
                (0.33, 1), (0.33, 0.33), (1, 0.33), (1, -0.33), (0.33, -0.33), (0.33, -1),
                (-0.33, -1), (-0.33, -0.33), (-1, -0.33), (-1, 0.33), (-0.33, 0.33), (-0.33, 1),
            )
        ],
    }[kind]  # fmt: skip
    pen.polygon(
        [(x + radius * r * math.cos(a + turn), y + radius * r * math.sin(a + turn)) for r, a in corners],
        fill=fill,
    )


def named(shape: Shape, language: Language) -> str:
    if language == "en":
        return f"{shape.colour} {shape.kind}"
    return ZH[shape.colour] + ZH[shape.kind]


def marks_of(shapes: list[Shape]) -> tuple[Mark, ...]:
    """At the centres of the cells; a shape strays from its centre by less than the cell."""
    return tuple(
        Mark(f"shape {s.kind}", 28.0 * (s.cell // 4) + 14, 28.0 * (s.cell % 4) + 14, s.colour) for s in shapes
    )


def _name(rng: np.random.Generator, shapes: list[Shape], language: Language) -> Turn:
    return Turn(pick(rng, NAME[language]), named(shapes[0], language), kind="shapes/name")


def _colour(rng: np.random.Generator, shapes: list[Shape], language: Language) -> Turn:
    colour = shapes[0].colour
    return Turn(pick(rng, COLOUR[language]), colour if language == "en" else ZH[colour], kind="shapes/colour")


def _count_all(rng: np.random.Generator, shapes: list[Shape], language: Language) -> Turn:
    return Turn(pick(rng, COUNT_ALL[language]), str(len(shapes)), kind="shapes/count all")


def _count(rng: np.random.Generator, shapes: list[Shape], language: Language) -> Turn:
    question, wanted = _counting_question(rng, shapes, language)
    return Turn(question, str(len(wanted)), kind="shapes/count some")


def _count_thinking(rng: np.random.Generator, shapes: list[Shape], language: Language) -> Turn:
    question, wanted = _counting_question(rng, shapes, language)
    comma, stop = (", ", ".") if language == "en" else ("，", "。")
    listed = comma.join(
        named(s, language) + (f" {wanted.index(s) + 1}" if s in wanted else "") for s in shapes
    )
    return Turn(question, str(len(wanted)), listed + stop, "shapes/count some thinking")


def _counting_question(
    rng: np.random.Generator, shapes: list[Shape], language: Language
) -> tuple[str, list[Shape]]:
    """About a colour or a kind; usually one that is there, so that zero is not the usual answer."""
    by_colour = rng.random() < 0.5
    present = sorted({s.colour if by_colour else s.kind for s in shapes})
    word = (
        pick(rng, present) if rng.random() < 0.85 else pick(rng, list(COLOURS) if by_colour else list(KINDS))
    )
    wanted = [s for s in shapes if word in (s.colour, s.kind)]
    if language == "zh":
        return (f"有几个{ZH[word]}的形状？" if by_colour else f"有几个{ZH[word]}？"), wanted
    plural = word + ("es" if word.endswith("s") else "s")
    return (f"How many {word} shapes are there?" if by_colour else f"How many {plural} are there?"), wanted
