"""Fluorescence fields: which marker dominates, how many nuclei carry it, what share. Not for clinical use.

On a dark ground lie blue nuclei (a DNA stain); some carry a green marker and some a red one, as a bright rim
of cytoplasm around the nucleus, never both. Out-of-focus haze is a crop of a texture of the split. The base
has seen brown and blue stain on light ground (`tasks.nuclei`), never light on dark, nor two markers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from duomo.tasks.drawing import SCALE, Canvas, Tint
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Pixels, Turn, any_language, pick, split_of

SIDE_PX, CELLS = 112, 4
FEWEST, MOST = 3, 9
MARKERS = {"en": ("green", "red"), "zh": ("绿色", "红色")}
DOMINANT = {
    "en": ("Which marker dominates?", "Is the green or the red marker on more cells?"),
    "zh": ("哪种标记占主导？", "绿色标记多还是红色标记多？"),
}
POSITIVE = {
    "en": ("How many cells are {a} positive?", "Count the cells with the {a} marker."),
    "zh": ("有多少个{a}阳性细胞？", "数一数带{a}标记的细胞。"),
}
SHARE = {
    "en": ("How many percent of the cells are {a} positive?", "What is the share of {a} cells in percent?"),
    "zh": ("{a}阳性细胞占百分之几？", "{a}细胞的比例是百分之多少？"),
}
ALL = {"en": ("How many nuclei are there?",), "zh": ("一共有多少个细胞核？",)}

Light = npt.NDArray[np.float32]


class Field(NamedTuple):
    """Cells of a grid of four by four, counted in rows, that hold a nucleus: with a marker, and without."""

    green: tuple[int, ...]
    red: tuple[int, ...]
    plain: tuple[int, ...]

    @property
    def scene(self) -> str:
        return f"fluorescence green {self.green} red {self.red} plain {self.plain}"

    @property
    def num_nuclei(self) -> int:
        return sum(map(len, self))


def generate(rng: np.random.Generator, pools: Pools) -> Example:
    """A field with a share in both modes, a marker's count, the number of nuclei and the dominant marker."""
    while True:
        field = _field(rng)
        if split_of(field.scene) == pools.split:
            break
    turns = [_share(rng, field, thinks) for thinks in (False, True)]
    language, marker = any_language(rng), int(rng.integers(2))
    asked = pick(rng, POSITIVE[language]).format(a=MARKERS[language][marker])
    turns.append(Turn(asked, str(len(field[marker])), kind="slides/positive"))
    language = any_language(rng)
    turns.append(Turn(pick(rng, ALL[language]), str(field.num_nuclei), kind="slides/nuclei"))
    if len(field.green) != len(field.red):
        language = any_language(rng)
        answer = MARKERS[language][len(field.red) > len(field.green)]
        turns.append(Turn(pick(rng, DOMINANT[language]), answer, kind="slides/dominant"))
    return Example(tuple(turns), field.scene, draw(rng, pools, field))


def _field(rng: np.random.Generator) -> Field:
    total = int(rng.integers(FEWEST, MOST + 1))
    marked = int(rng.integers(1, total + 1))
    green = int(rng.integers(0, marked + 1))
    cells = [int(c) for c in rng.choice(CELLS * CELLS, size=total, replace=False)]
    parts = cells[:green], cells[green:marked], cells[marked:]
    return Field(*(tuple(sorted(part)) for part in parts))


def _share(rng: np.random.Generator, field: Field, thinks: bool) -> Turn:
    language, marker = any_language(rng), int(rng.integers(2))
    name, count, total = MARKERS[language][marker], len(field[marker]), field.num_nuclei
    answer = f"{round(100 * count / total)}%"
    said = (
        f"{name} {count}, all {total}. {count}/{total}={answer}."
        if language == "en"
        else f"{name}{count}，共{total}。{count}/{total}={answer}。"
    )
    kind = "slides/share thinking" if thinks else "slides/share"
    return Turn(pick(rng, SHARE[language]).format(a=name), answer, said if thinks else None, kind)


def draw(rng: np.random.Generator, pools: Pools, field: Field) -> Pixels:
    """Light adds up: nuclei and markers, blurred by the optics, over haze, under shot noise."""
    canvas = Canvas(SIDE_PX, SIDE_PX, (0, 0, 0))
    pitch = SIDE_PX / CELLS
    for marker, cells in enumerate(field):
        for cell in cells:
            row, column = divmod(cell, CELLS)
            x, y = pitch * (column + 0.5) + rng.uniform(-3, 3), pitch * (row + 0.5) + rng.uniform(-3, 3)
            if marker < 2:
                _marker(rng, canvas, x, y, marker)
            nucleus = _light(rng, (35, 60, 210), 20)
            canvas.ellipse(x, y, rng.uniform(5.5, 7.5), rng.uniform(5.5, 7.5), nucleus)
    blurred = canvas.picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8) * SCALE))
    light = np.asarray(blurred.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX), dtype=np.float32)
    light = light + _haze(rng, pools)[..., None] * np.array([0.3, 0.4, 1.0]) * rng.uniform(10, 35)
    light += rng.normal(0, 1, light.shape) * (1.5 + 0.25 * np.sqrt(np.clip(light, 0, None)))
    picture_HW3: Pixels = np.clip(light, 0, 255).astype(np.uint8)
    return picture_HW3


def _marker(rng: np.random.Generator, canvas: Canvas, x: float, y: float, marker: int) -> None:
    """Uneven cytoplasm around a nucleus."""
    light = _light(rng, ((30, 190, 50), (210, 40, 40))[marker], 25)
    canvas.ellipse(x, y, rng.uniform(8.5, 10), rng.uniform(8.5, 10), light)
    for angle in rng.uniform(0, 2 * math.pi, size=5):
        lobe, away = rng.uniform(3, 4.5), rng.uniform(5, 7)
        canvas.ellipse(x + away * math.cos(angle), y + away * math.sin(angle), lobe, lobe, light)


def _light(rng: np.random.Generator, base: tuple[int, int, int], spread: float) -> Tint:
    return tuple(int(v) for v in np.clip(np.array(base) + rng.uniform(-spread, spread, 3), 0, 255))


def _haze(rng: np.random.Generator, pools: Pools) -> Light:
    """[SIDE_PX, SIDE_PX] from 0 to 1: a far blurred crop."""
    texture = pools.textures[int(rng.integers(len(pools.textures)))]
    height, width = texture.shape
    side = int(rng.integers(56, min(height, width) + 1))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    crop = Image.fromarray(texture[top : top + side, left : left + side]).resize((SIDE_PX, SIDE_PX))
    haze: Light = np.array(crop.filter(ImageFilter.GaussianBlur(6)), dtype=np.float32)
    haze -= haze.min()
    haze /= max(1.0, float(haze.max()))
    return haze
