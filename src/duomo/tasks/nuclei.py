"""Stained nuclei: which stain dominates, how many are positive, what share. Not for clinical use.

Drawn nuclei are blue (haematoxylin) or brown (DAB, positive); the share of positive ones is drawn first.
Real crops come from one half of scikit-image's slide, labelled by the area of each stain after colour
deconvolution.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from duomo.tasks.drawing import Canvas, Tint, noisy
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Mark, Pixels, Turn, any_language, pick, split_of

SIDE_PX = 112
MOST = 10
STAINS = {"en": ("blue", "brown"), "zh": ("蓝色", "棕色")}
DOMINANT = {
    "en": ("Which stain dominates?", "Is there more blue or more brown stain?"),
    "zh": ("哪种染色占主导？", "蓝色多还是棕色多？"),
}
POSITIVE = {
    "en": ("How many nuclei are positive?", "Count the brown nuclei."),
    "zh": ("有多少个阳性细胞核？", "数一数棕色的细胞核。"),
}
SHARE = {
    "en": ("What is the positivity in percent?", "How many percent of the nuclei are positive?"),
    "zh": ("阳性率是百分之多少？", "阳性细胞核占百分之几？"),
}
AREA = {
    "en": ("How many percent of the stained area are brown?",),
    "zh": ("染色面积中棕色占百分之多少？",),
}
# Optical densities above which a pixel counts as stained, for the two maps of skimage's rgb2hed: about the
# medians of the training half, so that neither stain dominates everywhere.
STAINED = (0.02, 0.075)
CROP_PX = (56, 112)


def generate(rng: np.random.Generator, pools: Pools) -> Example:
    """Mostly drawn nuclei; a third are real crops."""
    return _crop(rng, pools) if rng.random() < 0.33 else _drawn(rng, pools)


def _drawn(rng: np.random.Generator, pools: Pools) -> Example:
    while True:
        total = int(rng.integers(2, MOST + 1))
        positive = int(rng.integers(0, total + 1))
        cells = rng.choice(16, size=total, replace=False)
        brown = sorted(int(c) for c in cells[:positive])
        blue = sorted(int(c) for c in cells[positive:])
        scene = f"nuclei brown {brown} blue {blue}"
        if split_of(scene) == pools.split:
            break
    canvas = Canvas(SIDE_PX, SIDE_PX, _stain(rng, (236, 226, 232), 10))
    marks = []
    for cell in (int(c) for c in rng.permutation(16)):
        row, column = divmod(cell, 4)
        x, y = 28 * column + 14 + rng.uniform(-3, 3), 28 * row + 14 + rng.uniform(-3, 3)
        if cell not in brown and cell not in blue:
            if rng.random() < 0.4:  # stroma: a pale streak that is no nucleus
                reach = rng.uniform(6, 12)
                canvas.line([(x - reach, y), (x + reach, y + rng.uniform(-8, 8))], (222, 205, 214), 2)
            continue
        base = (122, 82, 46) if cell in brown else (98, 108, 168)
        rx, ry = rng.uniform(7, 11, size=2)
        canvas.ellipse(x, y, rx, ry, _stain(rng, base, 16))
        for _ in range(3):  # chromatin
            angle, r = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.6)
            speck = _stain(rng, base, 12, 0.75)
            canvas.ellipse(x + rx * r * math.cos(angle), y + ry * r * math.sin(angle), 1.6, 1.6, speck)
        marks.append(Mark("nucleus", y, x, "brown" if cell in brown else "blue"))
    turns = [_share(rng, positive, total, thinks) for thinks in (False, True)]
    language = any_language(rng)
    turns.append(Turn(pick(rng, POSITIVE[language]), str(positive), kind="nuclei/positive"))
    if 2 * positive != total:
        turns.append(_dominant(rng, 2 * positive > total))
    return Example(tuple(turns), scene, noisy(rng, canvas.pixels(), 8.0), tuple(marks))


def _stain(rng: np.random.Generator, base: tuple[int, int, int], spread: float, dark: float = 1.0) -> Tint:
    return tuple(int(v) for v in np.clip(np.array(base) * dark + rng.uniform(-spread, spread, 3), 0, 255))


def _dominant(rng: np.random.Generator, is_brown: bool, where: str = "nuclei/dominant") -> Turn:
    language = any_language(rng)
    return Turn(pick(rng, DOMINANT[language]), STAINS[language][is_brown], kind=where)


def _share(rng: np.random.Generator, positive: int, total: int, thinks: bool) -> Turn:
    language: Language = any_language(rng)
    answer = f"{round(100 * positive / total)}%"
    said = (
        f"Brown {positive}, all {total}. {positive}/{total}={answer}."
        if language == "en"
        else f"棕色{positive}，共{total}。{positive}/{total}={answer}。"
    )
    kind = "nuclei/share thinking" if thinks else "nuclei/share"
    return Turn(pick(rng, SHARE[language]), answer, said if thinks else None, kind)


def _varied(rng: np.random.Generator, picture: Pixels) -> Pixels:
    """Perhaps on its side, a little lighter or darker: the training half of the slide is small."""
    picture = np.rot90(picture) if rng.random() < 0.5 else picture
    gain = rng.uniform(0.9, 1.06) * rng.uniform(0.97, 1.03, size=3)
    return np.clip(picture * gain, 0, 255).astype(np.uint8)


def _crop(rng: np.random.Generator, pools: Pools) -> Example:
    """A window of the real slide; the dominating stain is drawn first where the slide has both."""
    wants_brown = bool(rng.random() < 0.5)
    for _ in range(12):
        side = int(rng.integers(*CROP_PX))
        top, left = (int(rng.integers(0, size - side)) for size in pools.slide.shape[:2])
        area = pools.stains[top : top + side, left : left + side]
        blue, brown = (float((area[..., i] > STAINED[i]).mean()) for i in range(2))
        share = brown / max(blue + brown, 1e-6)
        if (share > 0.5) == wants_brown and abs(share - 0.5) > 0.04:
            break
    crop = Image.fromarray(pools.slide[top : top + side, left : left + side])
    picture = np.asarray(crop.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
    if pools.split == "train":
        picture = _varied(rng, picture)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
    if rng.random() < 0.5:
        picture = picture[::-1]
    language = any_language(rng)
    tens = f"{round(share * 10) * 10}%"
    turns = (
        _dominant(rng, share > 0.5, "nuclei/dominant real"),
        Turn(pick(rng, AREA[language]), tens, kind="nuclei/area real"),
    )
    return Example(turns, f"slide {pools.split} {top} {left} {side}", np.ascontiguousarray(picture))
