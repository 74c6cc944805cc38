"""`python -m duomo.evals.sheets`: a sheet of pictures of every family, to be looked at."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import load_pools

COLUMNS, ROWS, GAP_PX = 6, 4, 4


def sheet(family: str, cache: Path, seed: int = 0) -> Image.Image | None:
    """Pictures of the training split, the last frame of videos; None for a family of text."""
    rng, pools, pictures = np.random.default_rng(seed), load_pools(cache, "train"), []
    for _ in range(COLUMNS * ROWS):
        picture = FAMILIES[family](rng, pools).picture
        if picture is not None:
            pictures.append(Image.fromarray(picture if picture.ndim == 3 else picture[-1]))
    if not pictures:
        return None
    width, height = (GAP_PX + max(sizes) for sizes in zip(*(p.size for p in pictures), strict=True))
    page = Image.new("RGB", (COLUMNS * width, ROWS * height), "white")
    for index, drawn in enumerate(pictures):
        page.paste(drawn, (index % COLUMNS * width, index // COLUMNS * height))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    parser.add_argument("--to", type=Path, default=Path("runs/sheets"), help="where the PNG files go")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        page = sheet(family, given.cache)
        if page is not None:
            page.save(given.to / f"{family}.png")


if __name__ == "__main__":
    main()
