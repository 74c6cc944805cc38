"""What the drawn families share: a pen on a canvas twice too large, so that edges come out smooth."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from duomo.tasks.pools import font
from duomo.tasks.scene import Pixels

SCALE = 2

Tint = tuple[int, ...]


class Canvas:
    """Coordinates are pixels of the finished picture."""

    def __init__(self, height: int, width: int, paper: Tint) -> None:
        self.picture = Image.new("RGB", (width * SCALE, height * SCALE), paper)
        self.pen = ImageDraw.Draw(self.picture)

    def line(self, points: list[tuple[float, float]], fill: Tint, width: float = 1.0) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.pen.line(scaled, fill=fill, width=max(1, round(width * SCALE)), joint="curve")

    def polygon(self, points: list[tuple[float, float]], fill: Tint) -> None:
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, fill: Tint | None, edge: Tint | None = None
    ) -> None:
        corners = (x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE)
        self.pen.rectangle(corners, fill=fill, outline=edge, width=SCALE)

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Tint | None, edge: Tint | None = None
    ) -> None:
        corners = ((x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE)
        self.pen.ellipse(corners, fill=fill, outline=edge, width=SCALE)

    def text(self, x: float, y: float, text: str, name: str, size_px: int, fill: Tint) -> None:
        """Centred at (x, y)."""
        self.pen.text((x * SCALE, y * SCALE), text, fill=fill, font=font(name, size_px * SCALE), anchor="mm")

    def pixels(self) -> Pixels:
        width, height = self.picture.size
        reduced = self.picture.resize((width // SCALE, height // SCALE), Image.Resampling.BOX)
        return np.asarray(reduced)


def tint(rng: np.random.Generator, low: float, high: float) -> Tint:
    """A grey with a cast."""
    grey = rng.uniform(low, high)
    return tuple(int(v) for v in np.clip(grey + rng.uniform(-12, 12, size=3), 0, 255))


def ink_and_paper(
    rng: np.random.Generator, ink: tuple[float, float], paper: tuple[float, float]
) -> tuple[Tint, Tint]:
    """Greys of these ranges, or one time in four black on white, as programs draw."""
    if rng.random() < 0.25:
        return tint(rng, 0, 12), (255, 255, 255)
    return tint(rng, *ink), tint(rng, *paper)


def vivid(rng: np.random.Generator) -> Tint:
    """A colour that stands out from light paper."""
    hue = rng.permutation([rng.uniform(20, 90), rng.uniform(60, 150), rng.uniform(140, 220)])
    return tuple(int(v) for v in hue)


def noisy(rng: np.random.Generator, picture: Pixels, most: float = 6.0) -> Pixels:
    noise = rng.normal(0, rng.uniform(0, most), size=(*picture.shape[:-1], 1))
    return np.clip(picture + noise, 0, 255).astype(np.uint8)
