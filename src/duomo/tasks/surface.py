"""A weld bead on sheet metal, or a plain surface: which defect, where, and OK or not by a stated rule.

The verdict is drawn first, evenly, then a rule (how many pores are allowed) and defects that lead to it. The
metal is drawn over crops of real textures (scikit-image); a product photo (Fashion-MNIST) is a wrong part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from duomo.tasks.drawing import SCALE, Canvas, noisy
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Mark, Pixels, Split, Turn, any_language, pick, split_of

HEIGHT_PX, WIDTH_PX = 84, 112
NAMES = {
    "pore": ("pore", "气孔"),
    "crack": ("crack", "裂纹"),
    "undercut": ("undercut", "咬边"),
    "spatter": ("spatter", "飞溅"),
    "wrong part": ("wrong part", "错件"),
    "clean": ("clean", "无缺陷"),
}
PLACES = {"en": ("left", "middle", "right"), "zh": ("左", "中", "右")}
# How many pores a rule allows, by split: thresholds that no training question states.
ALLOWED: dict[Split, tuple[int, ...]] = {"train": (0, 1, 3, 4), "dev": (2,), "test": (2,)}
# Of further verdicts behind one picture, in training alone: the order of numbers, not two of them by heart.
MORE_ALLOWED = (0, 1, 3, 4, 5, 6)
KIND = {
    "en": ("Which defect does the part have?", "What is wrong here?", "Name the defect."),
    "zh": ("这个零件有什么缺陷？", "这里有什么问题？", "说出缺陷的种类。"),
}
VERDICT = {
    "en": (
        "OK or NG? At most {n} pores are allowed, no other defect.",
        "Pass? Up to {n} pores may be there.",
    ),
    "zh": ("合格吗？最多允许{n}个气孔，不允许其他缺陷。", "OK还是NG？气孔不得超过{n}个。"),
}
WHERE = {
    "en": ("Where is the defect?", "In which part of the picture is the defect?"),
    "zh": ("缺陷在哪里？", "缺陷位于哪个部分？"),
}


class Sheet(NamedTuple):
    """A square of one of the split's textures, in pixels."""

    texture: int
    top: int
    left: int
    side: int


def generate(rng: np.random.Generator, pools: Pools, num_lookups: int = 1) -> Example:
    """A part with its verdict in both modes, the defect's kind and its place.

    More look-ups are verdicts on the same part by other rules; a test has none.
    """
    while True:
        is_ok = bool(rng.random() < 0.5)
        allowed = pick_number(rng, ALLOWED[pools.split])
        defects = _defects(rng, is_ok, allowed)
        sheet, has_bead = _cut(rng, pools), bool(rng.random() < 0.5)
        listed = " ".join(f"{kind}@{x}" for kind, x in defects) or f"clean {sheet}"
        scene = f"surface {'bead' if has_bead else 'plain'} {listed}"
        if split_of(scene) == pools.split:
            break
    picture, marks = draw(rng, pools, defects, sheet, has_bead)
    turns = [_verdict(rng, defects, allowed, thinks) for thinks in (False, True)]
    kinds = {kind for kind, _ in defects}
    language = any_language(rng)
    if len(kinds) < 2:
        kind = next(iter(kinds), "clean")
        turns.append(Turn(pick(rng, KIND[language]), named(kind, language), kind="surface/kind"))
    thirds = {third(x) for _, x in defects}
    if len(thirds) == 1 and kinds != {"undercut"}:
        turns.append(Turn(pick(rng, WHERE[language]), PLACES[language][thirds.pop()], kind="surface/where"))
    for index in range(num_lookups - 1):
        turns.append(_verdict(rng, defects, pick_number(rng, MORE_ALLOWED), thinks=index % 2 == 1))
    return Example(tuple(turns), scene, picture, marks)


def _passes(defects: list[tuple[str, int]], allowed: int) -> bool:
    return all(kind == "pore" for kind, _ in defects) and len(defects) <= allowed


def pick_number(rng: np.random.Generator, choices: tuple[int, ...]) -> int:
    return choices[int(rng.integers(len(choices)))]


def named(kind: str, language: Language) -> str:
    return NAMES[kind][0 if language == "en" else 1]


def third(x: int) -> int:
    return min(2, 3 * x // WIDTH_PX)


def _defects(rng: np.random.Generator, is_ok: bool, allowed: int) -> list[tuple[str, int]]:
    """Kinds with their columns, from left to right. OK: clean or pores as allowed; NG: anything else."""
    if is_ok:
        kinds = ["pore"] * int(rng.integers(0, allowed + 1))
    elif rng.random() < 0.4:
        kinds = ["pore"] * int(rng.integers(allowed + 1, allowed + 4))
    else:
        kinds = [pick(rng, ("crack", "undercut", "spatter", "wrong part"))]
        kinds += ["pore"] * int(rng.integers(0, 2))
    # Columns to the pixel: few single defects would else be left for the small splits.
    columns = 12 + 15 * rng.choice(7, size=len(kinds), replace=False) + rng.integers(-5, 6, size=len(kinds))
    found = [(kind, int(column)) for kind, column in zip(kinds, columns, strict=True)]
    return sorted(found, key=lambda defect: defect[1])


def _verdict(rng: np.random.Generator, defects: list[tuple[str, int]], allowed: int, thinks: bool) -> Turn:
    language = any_language(rng)
    asked = pick(rng, VERDICT[language]).format(n=allowed)
    comma, stop = (", ", ". ") if language == "en" else ("，", "。")
    listed = comma.join(f"{named(kind, language)} {PLACES[language][third(x)]}" for kind, x in defects)
    pores = sum(kind == "pore" for kind, _ in defects)
    sign = ">" if pores > allowed else "<="
    rule = f"{named('pore', language)} {pores}{sign}{allowed}"
    said = f"{listed or named('clean', language)}{stop}{rule}{stop.strip()}"
    kind = "surface/verdict thinking" if thinks else "surface/verdict"
    return Turn(asked, "OK" if _passes(defects, allowed) else "NG", said if thinks else None, kind)


def draw(
    rng: np.random.Generator, pools: Pools, defects: list[tuple[str, int]], sheet: Sheet, has_bead: bool
) -> tuple[Pixels, tuple[Mark, ...]]:
    canvas = Canvas(HEIGHT_PX, WIDTH_PX, (128, 128, 128))
    metal = rng.uniform(110, 190)
    canvas.picture.paste(_sheet(rng, pools, sheet, metal))
    middle, half = HEIGHT_PX / 2 + rng.uniform(-6, 6), rng.uniform(13, 18)
    if has_bead:
        _bead(rng, canvas, metal, middle, half)
    marks = []
    for kind, x in defects:
        y = _defect(rng, canvas, pools, kind, x, middle, half, metal)
        marks.append(Mark(f"defect {kind}", y, x))
    return noisy(rng, canvas.pixels()), tuple(marks)


def _cut(rng: np.random.Generator, pools: Pools) -> Sheet:
    place = int(rng.integers(len(pools.textures)))
    height, width = pools.textures[place].shape
    side = int(rng.integers(56, min(height, width) + 1))
    return Sheet(place, int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1)), side)


def _sheet(rng: np.random.Generator, pools: Pools, cut: Sheet, metal: float) -> Image.Image:
    """The crop, softened and brought to the metal's brightness."""
    texture = pools.textures[cut.texture]
    crop = Image.fromarray(texture[cut.top : cut.top + cut.side, cut.left : cut.left + cut.side])
    grey = np.asarray(crop.resize((WIDTH_PX * SCALE // 2, HEIGHT_PX * SCALE // 2)), dtype=np.float32)
    grey = metal + (grey - grey.mean()) * rng.uniform(0.08, 0.25)
    soft = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    return soft.resize((WIDTH_PX * SCALE, HEIGHT_PX * SCALE), Image.Resampling.BILINEAR).convert("RGB")


def _bead(rng: np.random.Generator, canvas: Canvas, metal: float, middle: float, half: float) -> None:
    """Overlapping ripples from left to right, lighter at the crest."""
    pitch = rng.uniform(4, 7)
    for x in np.arange(-half, WIDTH_PX + half, pitch):
        for shrink, lift in ((1.0, -22), (0.8, 2), (0.5, 20)):
            grey = int(np.clip(metal + lift + rng.uniform(-6, 6), 0, 255))
            canvas.ellipse(x, middle, half * 0.8 * shrink, half * shrink, (grey, grey, min(255, grey + 6)))


def _defect(
    rng: np.random.Generator,
    canvas: Canvas,
    pools: Pools,
    kind: str,
    x: float,
    middle: float,
    half: float,
    metal: float,
) -> float:
    """Draws it at column x; returns the row of its centre."""
    dark = tuple(int(v) for v in np.clip(metal * rng.uniform(0.15, 0.35) + rng.uniform(-8, 8, 3), 0, 255))
    y = middle + rng.uniform(-0.55, 0.55) * half
    if kind == "pore":
        radius = rng.uniform(2.2, 3.6)
        canvas.ellipse(x, y, radius, radius * rng.uniform(0.8, 1.2), dark)
    elif kind == "crack":
        y, reach = middle, rng.uniform(9, 14)
        steps = np.linspace(-reach, reach, 7)
        canvas.line([(x + rng.uniform(-3, 3), y + float(step)) for step in steps], dark, 1.4)
    elif kind == "undercut":
        y = middle + half * (1 if rng.random() < 0.5 else -1)
        canvas.ellipse(x, y, rng.uniform(10, 15), rng.uniform(1.8, 2.6), dark)
    elif kind == "spatter":
        y = middle + (half + 10) * (1 if rng.random() < 0.5 else -1)
        for _ in range(int(rng.integers(4, 7))):
            radius, (dx, dy) = rng.uniform(1.3, 2.4), rng.uniform(-7, 7, size=2)
            canvas.ellipse(x + dx, y + dy, radius, radius, (250, 240, 215))
    else:
        part = Image.fromarray(pools.products[int(rng.integers(len(pools.products)))])
        size = 28 * SCALE
        part = part.resize((size, size))
        y = middle + rng.uniform(-10, 10)
        place = (int(x * SCALE) - size // 2, int(y * SCALE) - size // 2)
        canvas.picture.paste(part.convert("RGB"), place, part.point(lambda v: 255 if v > 24 else 0))
    return float(np.clip(y, 0, HEIGHT_PX - 1)) if math.isfinite(y) else middle
