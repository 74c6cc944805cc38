"""Where shapes are and how many: quadrants, boxes in ERNIE's `<|LOC_x|>` tokens, counting to nine.

Some pairs of colour and kind are never drawn in training (HELD_OUT), so that naming them shows whether the
two are seen apart. Counting aloud lists the shapes in raster order.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from duomo.tasks import shapes
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Mark, Pixels, Split, Turn, any_language, pick, split_of

KINDS = (*shapes.KINDS, "diamond", "ring")
COLOURS = {**shapes.COLOURS, "black": (30, 30, 30), "pink": (250, 150, 190)}
ZH = {**shapes.ZH, "diamond": "菱形", "ring": "圆环", "black": "黑色", "pink": "粉色"}
HELD_OUT = {("black", "star"), ("pink", "circle"), ("red", "diamond"), ("blue", "ring"), ("black", "ring")}
MOST = 9
SIDE_PX = 112
QUADRANTS = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上", "右上", "左下", "右下"),
}
COUNT = shapes.COUNT_ALL
WHERE = {
    "en": ("Where is the {s}?", "In which corner is the {s}?"),
    "zh": ("{s}在哪里？", "{s}在哪个角？"),
}
BOX = {"en": ("Locate the {s}.", "Give the box of the {s}."), "zh": ("定位{s}。", "给出{s}的位置框。")}
NAME = {
    "en": ("What is in the {q}?", "Which shape is in the {q}?"),
    "zh": ("{q}是什么？", "{q}是什么形状？"),
}


def draw_scene(rng: np.random.Generator, split: Split) -> list[shapes.Shape]:
    """One to nine different shapes of the split, in raster order; in a test half have a held-out pair."""
    count = int(rng.integers(1, MOST + 1))
    wants_unseen = split != "train" and rng.random() < 0.5
    while True:
        cells = sorted(int(cell) for cell in rng.choice(16, size=count, replace=False))
        pairs = rng.choice(len(KINDS) * len(COLOURS), size=count, replace=False)
        found = [
            shapes.Shape(KINDS[pair % len(KINDS)], tuple(COLOURS)[pair // len(KINDS)], cell)
            for pair, cell in zip(pairs, cells, strict=True)
        ]
        if wants_unseen:
            colour, kind = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
            found[int(rng.integers(count))] = shapes.Shape(kind, colour, found[0].cell)
            found = _raster(found, cells)
        unseen = any((shape.colour, shape.kind) in HELD_OUT for shape in found)
        distinct = len({(shape.colour, shape.kind) for shape in found}) == count
        if distinct and unseen == wants_unseen and split_of(scene_of(found)) == split:
            return found


def _raster(found: list[shapes.Shape], cells: list[int]) -> list[shapes.Shape]:
    return [shape._replace(cell=cell) for shape, cell in zip(found, cells, strict=True)]


def scene_of(found: list[shapes.Shape]) -> str:
    return "places " + " ".join(f"{s.colour}-{s.kind}@{s.cell}" for s in found)


def named(shape: shapes.Shape, language: Language) -> str:
    return f"{shape.colour} {shape.kind}" if language == "en" else ZH[shape.colour] + ZH[shape.kind]


def generate(rng: np.random.Generator, pools: Pools, num_lookups: int = 1) -> Example:
    """A scene with counting in both modes, and of each of some shapes a place, a box and a name."""
    found = draw_scene(rng, pools.split)
    picture, boxes = draw(rng, found)
    target = int(rng.integers(len(found)))
    for index, shape in enumerate(found):  # what was held out is asked about
        if (shape.colour, shape.kind) in HELD_OUT:
            target = index
    turns = [_count(rng, found, False), _count(rng, found, True)]
    turns += _lookup(rng, found, boxes, target)
    for _ in range(num_lookups - 1):
        turns += _lookup(rng, found, boxes, int(rng.integers(len(found))))
    marks = tuple(
        Mark(f"shape {s.kind}", (box[1] + box[3]) / 2, (box[0] + box[2]) / 2, s.colour)
        for s, box in zip(found, boxes, strict=True)
    )
    return Example(tuple(turns), scene_of(found), picture, marks)


def _lookup(
    rng: np.random.Generator,
    found: list[shapes.Shape],
    boxes: list[tuple[float, float, float, float]],
    target: int,
) -> list[Turn]:
    turns = [_where(rng, found[target]), _box(rng, found[target], boxes[target])]
    quadrant = _quadrant(found[target])
    if sum(_quadrant(shape) == quadrant for shape in found) == 1:
        turns.append(_name(rng, found[target]))
    return turns


def draw(
    rng: np.random.Generator, found: list[shapes.Shape]
) -> tuple[Pixels, list[tuple[float, float, float, float]]]:
    """The picture, and the box of every shape: left, top, right, bottom in pixels."""
    paper = tuple(int(v) for v in rng.uniform(215, 256, size=3))
    picture = Image.new("RGB", (2 * SIDE_PX, 2 * SIDE_PX), paper)
    pen, boxes = ImageDraw.Draw(picture), []
    for shape in found:
        row, column = divmod(shape.cell, 4)
        radius = rng.uniform(7.5, 12.5)
        x, y = 28 * column + 14 + rng.uniform(-2, 2), 28 * row + 14 + rng.uniform(-2, 2)
        tint = tuple(int(np.clip(c + rng.uniform(-18, 18), 0, 255)) for c in COLOURS[shape.colour])
        shapes.draw_shape(pen, shape.kind, 2 * x, 2 * y, 2 * radius, rng.uniform(-0.15, 0.15), tint)
        boxes.append((x - radius, y - radius, x + radius, y + radius))
    return np.asarray(picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)), boxes


def _quadrant(shape: shapes.Shape) -> int:
    row, column = divmod(shape.cell, 4)
    return 2 * (row // 2) + column // 2


def _count(rng: np.random.Generator, found: list[shapes.Shape], thinks: bool) -> Turn:
    language = any_language(rng)
    comma, stop = (", ", ".") if language == "en" else ("，", "。")
    listed = comma.join(f"{named(s, language)} {i}" for i, s in enumerate(found, start=1)) + stop
    kind = "places/count thinking" if thinks else "places/count"
    return Turn(pick(rng, COUNT[language]), str(len(found)), listed if thinks else None, kind)


def _where(rng: np.random.Generator, shape: shapes.Shape) -> Turn:
    language = any_language(rng)
    asked = pick(rng, WHERE[language]).format(s=named(shape, language))
    return Turn(asked, QUADRANTS[language][_quadrant(shape)], kind="places/where")


def _name(rng: np.random.Generator, shape: shapes.Shape) -> Turn:
    language = any_language(rng)
    asked = pick(rng, NAME[language]).format(q=QUADRANTS[language][_quadrant(shape)])
    unseen = (shape.colour, shape.kind) in HELD_OUT
    return Turn(asked, named(shape, language), kind="places/name unseen pair" if unseen else "places/name")


def _box(rng: np.random.Generator, shape: shapes.Shape, box: tuple[float, float, float, float]) -> Turn:
    language = any_language(rng)
    asked = pick(rng, BOX[language]).format(s=named(shape, language))
    return Turn(asked, located(box), kind="places/box")


def located(box: tuple[float, float, float, float]) -> str:
    """A box in ERNIE's tokens: thousandths of the picture's sides, in steps of ten."""
    places = (min(1000, max(0, round(edge * 100 / SIDE_PX) * 10)) for edge in box)
    return "<|LOC_BEGIN|>" + "".join(f"<|LOC_{place}|>" for place in places) + "<|LOC_END|>"
