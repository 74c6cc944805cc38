"""`python -m duomo.evals.pictures`: the sample pictures of the README, drawn from the test split.

Handwriting of these pictures stands in no training picture, and the scene of shapes is a test scene. The
seeds are fixed here, so anybody can draw the same files again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from duomo.tasks import Handwriting, load_handwriting, shapes
from duomo.tasks.digits import warp
from duomo.tasks.scene import Pixels, split_of

DIGITS = (4, 7, 2)
DIGITS_SEED = 2
SHAPES = (
    shapes.Shape("circle", "red", 1),
    shapes.Shape("square", "blue", 7),
    shapes.Shape("star", "yellow", 14),
)


def digits_picture(pool: Handwriting, seed: int = DIGITS_SEED, values: tuple[int, ...] = DIGITS) -> Pixels:
    """Dark ink on white, 112 wide and 84 high."""
    rng = np.random.default_rng(seed)
    ink = np.zeros((84, 112), dtype=np.float32)
    for place, value in enumerate(values):
        np.maximum(ink, warp(rng, pool.draw(rng, value), 42, 22 + 34 * place, 34, (84, 112), 0.3), out=ink)
    return np.repeat((255 - 235 * ink)[..., None], 3, axis=2).astype(np.uint8)


def shapes_picture(seed: int = 0) -> Pixels:
    """A red circle, a blue square and a yellow star; a scene of the test split."""
    return shapes.draw(np.random.default_rng(seed), list(SHAPES))


def shapes_split() -> str:
    return split_of("shapes " + " ".join(sorted(f"{s.colour}-{s.kind}@{s.cell}" for s in SHAPES)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    parser.add_argument("--to", type=Path, default=Path("docs/pictures"), help="where the PNG files go")
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    pool = load_handwriting(options.cache, "test")
    Image.fromarray(digits_picture(pool)).save(options.to / "digits.png", optimize=True)
    Image.fromarray(shapes_picture()).save(options.to / "shapes.png", optimize=True)


if __name__ == "__main__":
    main()
