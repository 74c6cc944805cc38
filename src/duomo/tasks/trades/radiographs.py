"""Radiographs of butt welds: the flaw, its place, and OK or NG with the reason by a stated rule.

A film is dark where little metal lay in the beam: the plate is dark grey, the weld's extra metal a bright
band, and a flaw, which is missing metal, a dark trace in or beside it. Grain and mottle come from a crop of
a texture of the split (scikit-image). One kind of flaw a film, all of it in one third, so that reason and
place can be named. The rule is stated in the question: some pores may be allowed, any other flaw never is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from duomo.tasks.drawing import SCALE, Canvas
from duomo.tasks.pools import Pools
from duomo.tasks.scene import Example, Language, Pixels, Turn, any_language, pick, split_of

HEIGHT_PX, WIDTH_PX = 84, 112
MOST_PORES = 4
ALLOWED = (0, 1, 2)
FLAWS = ("pores", "slag", "lack of fusion", "undercut", "crack")
NAMES = {
    "pores": ("pores", "气孔"),
    "slag": ("slag", "夹渣"),
    "lack of fusion": ("lack of fusion", "未熔合"),
    "undercut": ("undercut", "咬边"),
    "crack": ("crack", "裂纹"),
    "": ("no flaw", "无缺陷"),
}
PLACES = {"en": ("left", "middle", "right"), "zh": ("左", "中", "右")}
VERDICT = {
    "en": (
        "Judge this radiograph. Pores allowed: {n}, no other flaw.",
        "Weld film, OK or NG, and why? Allowed number of pores: {n}; no other flaw.",
    ),
    "zh": (
        "评定这张焊缝底片：气孔最多{n}个，不允许其他缺陷。",
        "底片是否合格？允许{n}个气孔，其他缺陷不允许。",
    ),
}
KIND = {
    "en": ("Which flaw does the film show?", "Name the flaw in the weld film."),
    "zh": ("底片上是什么缺陷？", "说出焊缝底片上的缺陷。"),
}
PLACE = {
    "en": ("In which third of the film is the flaw?", "Where on the film is the flaw?"),
    "zh": ("缺陷在底片的哪一部分？", "缺陷在底片的什么位置？"),
}

Density = npt.NDArray[np.float32]


class Film(NamedTuple):
    """`flaw` is "" on a sound weld; `traces` are columns and rows, from the bead's middle line, in pixels.

    `outline` seeds the ragged or zigzag shape, so that shapes too belong to a split with their scene.
    """

    flaw: str
    third: int
    traces: tuple[tuple[int, int], ...]
    outline: int
    mottle: tuple[int, int, int, int]  # of the texture: which, top, left, side

    @property
    def scene(self) -> str:
        """Without the mottle, unless nothing else tells two sound welds apart."""
        if not self.flaw:
            return f"radiograph sound {self.mottle}"
        return f"radiograph {self.flaw} {self.traces} {self.outline}"


def generate(rng: np.random.Generator, pools: Pools) -> Example:
    """A film with its verdict in both modes, the flaw's kind and, if there is one, its place."""
    while True:
        allowed = ALLOWED[int(rng.integers(len(ALLOWED)))]
        film = _film(rng, pools, is_ok=bool(rng.random() < 0.5), allowed=allowed)
        if split_of(film.scene) == pools.split:
            break
    turns = [verdict(rng, film, allowed, thinks) for thinks in (False, True)]
    language = any_language(rng)
    turns.append(Turn(pick(rng, KIND[language]), named(film.flaw, language), kind="weld/kind"))
    if film.flaw:
        language = any_language(rng)
        turns.append(Turn(pick(rng, PLACE[language]), PLACES[language][film.third], kind="weld/place"))
    return Example(tuple(turns), film.scene, draw(rng, pools, film))


def named(flaw: str, language: Language) -> str:
    return NAMES[flaw][0 if language == "en" else 1]


def verdict(rng: np.random.Generator, film: Film, allowed: int, thinks: bool) -> Turn:
    """OK, or NG with flaw and place; the thought counts what the rule is about."""
    language = any_language(rng)
    comma, colon, stop = (", ", ": ", ".") if language == "en" else ("，", "：", "。")
    found = named(film.flaw, language)
    place = PLACES[language][film.third]
    pores = len(film.traces) if film.flaw == "pores" else 0
    is_ok = not film.flaw or 0 < pores <= allowed
    said = f"{found}{comma}{place}{stop}" if film.flaw else f"{found}{stop}"
    if pores:
        said += f"{' ' if language == 'en' else ''}{pores}{'<=' if is_ok else '>'}{allowed}{stop}"
    return Turn(
        pick(rng, VERDICT[language]).format(n=allowed),
        "OK" if is_ok else f"NG{colon}{found}{comma}{place}",
        said if thinks else None,
        "weld/verdict thinking" if thinks else "weld/verdict",
    )


def _film(rng: np.random.Generator, pools: Pools, is_ok: bool, allowed: int) -> Film:
    """OK: sound, or pores as allowed; NG: too many pores, or another flaw."""
    flaw = FLAWS[int(rng.integers(len(FLAWS)))]
    count = 1
    if is_ok:
        flaw = "pores" if allowed and rng.random() < 0.6 else ""
        count = int(rng.integers(1, allowed + 1)) if flaw else 0
    elif flaw == "pores":
        count = int(rng.integers(allowed + 1, MOST_PORES + 1))
    third = int(rng.integers(3))
    middle = round((third + 0.5) * WIDTH_PX / 3)
    if flaw == "pores":  # apart from one another: a place in a grid of three by two each
        places = (divmod(int(p), 2) for p in rng.choice(6, size=count, replace=False))
        spread = [(middle + 11 * (c - 1), 14 * r - 7) for c, r in places]
    else:
        spread = [(middle, 0)] * count
    reach = 2 if flaw == "pores" else 7
    jitter = rng.integers(-reach, reach + 1, size=(count, 2))
    traces = tuple(
        sorted((int(x + dx), int(y + dy)) for (x, y), (dx, dy) in zip(spread, jitter, strict=True))
    )
    which = int(rng.integers(len(pools.textures)))
    height, width = pools.textures[which].shape
    side = int(rng.integers(56, min(height, width) + 1))
    top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    return Film(flaw, third, traces, int(rng.integers(1000)), (which, top, left, side))


def draw(rng: np.random.Generator, pools: Pools, film: Film) -> Pixels:
    """Plate and bead by density, traces darker by what is missing, then blur, mottle and grain."""
    middle, half = HEIGHT_PX / 2 + rng.uniform(-4, 4), rng.uniform(15, 18)
    plate, lift = rng.uniform(45, 75), rng.uniform(75, 100)
    rows_H, columns_W = np.arange(HEIGHT_PX), np.arange(WIDTH_PX)
    edge_W = half + np.convolve(rng.normal(0, 2, WIDTH_PX + 8), np.ones(9) / 9, "valid")
    depth_HW = 1 - ((rows_H[:, None] - middle) / edge_W[None]) ** 2
    ripple_W = 1 + 0.05 * np.sin(columns_W * rng.uniform(0.7, 1.1))
    grey_HW = plate + lift * np.clip(depth_HW, 0, 1) ** 0.5 * ripple_W[None]
    missing = _traces(film, middle, half)
    grey_HW *= 1 - missing * rng.uniform(0.5, 0.7)
    which, top, left, side = film.mottle
    crop = Image.fromarray(pools.textures[which][top : top + side, left : left + side])
    mottle_HW = np.asarray(crop.resize((WIDTH_PX, HEIGHT_PX)), dtype=np.float32)
    grey_HW += (mottle_HW - mottle_HW.mean()) * rng.uniform(0.03, 0.09)
    grey_HW += rng.normal(0, rng.uniform(1.5, 4), grey_HW.shape)
    return np.repeat(np.clip(grey_HW, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _traces(film: Film, middle: float, half: float) -> Density:
    """Share of the metal that is missing, 0 to 1, [height, width]: soft, as a radiograph's edges are."""
    rng, canvas = np.random.default_rng(film.outline), Canvas(HEIGHT_PX, WIDTH_PX, (0, 0, 0))
    side = 1 if film.traces and film.traces[0][1] >= 0 else -1
    for x, offset in film.traces:
        y, full = middle + offset, (255, 255, 255)
        if film.flaw == "pores":
            radius = rng.uniform(2.6, 3.4)
            canvas.ellipse(x, y, radius, radius, full)
        elif film.flaw == "slag":  # a ragged lump along the weld
            for step in np.linspace(-7, 7, 6):
                canvas.ellipse(x + step, y + rng.uniform(-2, 2), rng.uniform(2, 4), rng.uniform(2, 3.5), full)
        elif film.flaw == "lack of fusion":  # straight, thin, where the weld meets the plate's flank
            level, reach = middle + side * half * 0.45, rng.uniform(13, 16)
            canvas.line([(x - reach, level), (x + reach, level)], full, 2.0)
        elif film.flaw == "undercut":  # a broad shallow groove at the edge of the bead
            canvas.ellipse(x, middle + side * half, rng.uniform(12, 16), rng.uniform(2.6, 3.6), full)
        else:  # a crack runs across the weld in a zigzag
            steps = np.linspace(-0.85 * half, 0.85 * half, 7)
            canvas.line([(x + rng.uniform(-3.5, 3.5), middle + float(step)) for step in steps], full, 1.5)
    soft = canvas.picture.convert("L").filter(ImageFilter.GaussianBlur(0.5 * SCALE))
    share: Density = np.array(soft.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BOX), dtype=np.float32)
    share /= 255
    return share
