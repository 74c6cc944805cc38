"""The linear convolutional codes: which weight a window of bits means.

A code shifts `bits` new bits per weight into a window of `window` bits. Every bit of the window owns a
column; the columns of the set bits, XORed, index a small signed codebook. It refuses codes whose window is
not whole symbols. Worth knowing: the columns of the newest and of the oldest symbol span the top index bits,
so the branches that leave or enter one trellis state fall into different quarters of the sorted codebook
(Ungerboeck's set partition); a random table of the same size has 6 % more distortion at L=12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from duomo.errors import ConfigError

LUT_OFFSET = 64
"""Codebook bytes are stored plus 64, so that they are unsigned and `maddubs` of two cannot saturate."""


@dataclass(frozen=True)
class TrellisCode:
    """weight = unit * row_scale * codebook[XOR of columns[i] over the set bits i of the window].

    columns    `window` integers; bit 0 of the window is the newest bit
    codebook   a power of two of integers in [-63, 63], for unit-variance weights divided by `unit`
    """

    name: str
    bits: int
    window: int
    columns: tuple[int, ...]
    codebook: tuple[int, ...]
    unit: float

    def __post_init__(self) -> None:
        size = len(self.codebook)

        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ConfigError(f"trellis code {self.name!r}: {message}")

        need(self.bits in (2, 4), f"{self.bits} bits a weight; it must be 2 or 4")
        need(self.bits < self.window <= 16, f"a window of {self.window} bits; it must be at most 16")
        need(
            self.window % self.bits == 0,
            f"a window of {self.window} bits is not whole {self.bits}-bit symbols",
        )
        need(len(self.columns) == self.window, f"{len(self.columns)} columns for a window of {self.window}")
        need(
            size >= 2 and size & (size - 1) == 0 and size <= 128,
            f"a codebook of {size}; it must be 2^m <= 128",
        )
        need(all(0 <= column < size for column in self.columns), f"a column outside [0, {size})")
        need(all(-63 <= value <= 63 for value in self.codebook), "a codebook value outside [-63, 63]")
        tops = tuple(size >> (self.bits - bit) for bit in range(self.bits))
        ends = (self.columns[: self.bits], self.columns[-self.bits :])
        need(ends == (tops, tops), f"the columns of the newest and of the oldest symbol must be {tops}")
        need(self.unit > 0, f"unit is {self.unit}; it must be positive")

    @property
    def num_states(self) -> int:
        """Trellis states: the window without its newest symbol."""
        return 1 << (self.window - self.bits)

    @property
    def codes_per_byte(self) -> int:
        return 8 // self.bits

    @property
    def row_multiple(self) -> int:
        """Rows of a matrix come in multiples of this: 16 lanes times the codes of one byte."""
        return 16 * self.codes_per_byte

    def hash_table(self) -> npt.NDArray[np.uint8]:
        """[2^window] -> codebook index."""
        return _hash_table(self.columns)

    def value_table(self) -> npt.NDArray[np.int8]:
        """[2^window] -> codebook value: the whole decoder as one table."""
        values: npt.NDArray[np.int8] = np.asarray(self.codebook, np.int8)[self.hash_table()]
        return values


@lru_cache(maxsize=16)
def _hash_table(columns: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    table = np.zeros(1, np.uint8)
    for column in columns:
        table = np.concatenate((table, table ^ np.uint8(column)))
    table.flags.writeable = False
    return table


LCC2_10 = TrellisCode(
    "lcc2-10", 2, 10, (16, 32, 11, 57, 37, 60, 63, 52, 16, 32),
    (-63, -47, -47, -41, -34, -35, -33, -31, -28, -27, -25, -23, -21, -19, -20, -19, -20, -14, -14, -13, -10,
     -11, -8, -9, -8, -8, -7, -7, -4, -1, 0, 0, 0, 3, 3, 3, 6, 4, 7, 8, 9, 10, 10, 11, 12, 17, 17, 16, 20, 18,
     20, 22, 23, 22, 27, 29, 31, 31, 34, 37, 44, 45, 45, 63),
    0.04089,
)  # fmt: skip
"""The fast one: 256 states."""

LCC2_12 = TrellisCode(
    "lcc2-12", 2, 12, (16, 32, 41, 28, 4, 13, 8, 50, 7, 12, 16, 32),
    (-60, -45, -42, -40, -33, -32, -30, -29, -27, -24, -23, -23, -19, -19, -16, -17, -16, -15, -13, -12,
     -11, -10, -8, -9, -8, -5, -5, -4, -4, -2, 1, -1, 1, 2, 3, 3, 5, 6, 6, 6, 7, 10, 10, 12, 11, 14, 17,
     15, 17, 18, 20, 20, 22, 24, 27, 23, 31, 30, 31, 35, 38, 44, 45, 60),
    0.043306,
)  # fmt: skip
"""The default: 1024 states. Its integers were polished (search.py, --polish, 8192 streams, seed 31)."""

LCC2_14 = TrellisCode(
    "lcc2-14", 2, 14, (16, 32, 44, 3, 12, 4, 49, 12, 57, 62, 39, 20, 16, 32),
    (-63, -48, -43, -38, -35, -33, -33, -29, -25, -26, -23, -23, -20, -22, -17, -20, -15, -15, -14, -12, -13,
     -10, -10, -8, -7, -6, -5, -4, -6, -2, -1, -1, 1, 2, 2, 1, 5, 7, 6, 7, 7, 9, 10, 12, 11, 15, 15, 16, 17,
     20, 19, 21, 20, 24, 26, 28, 30, 32, 31, 40, 38, 45, 49, 63),
    0.04114,
)  # fmt: skip
"""The patient one: 4096 states."""

LCC4_12 = TrellisCode(
    "lcc4-12", 4, 12, (8, 16, 32, 64, 76, 122, 105, 17, 8, 16, 32, 64),
    (-63, -52, -46, -41, -38, -36, -34, -32, -31, -29, -28, -27, -26, -26, -24, -24, -22, -22, -22, -21, -21,
     -19, -19, -19, -17, -17, -17, -17, -16, -15, -15, -14, -13, -13, -13, -13, -12, -12, -11, -11, -10, -10,
     -9, -9, -9, -8, -8, -7, -6, -7, -6, -6, -5, -5, -4, -4, -3, -3, -3, -2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3,
     3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 7, 8, 8, 9, 10, 9, 10, 11, 11, 12, 11, 12, 13, 13, 14, 15, 15, 15, 16,
     16, 17, 17, 18, 18, 19, 21, 21, 21, 20, 22, 23, 23, 24, 25, 26, 27, 28, 29, 31, 32, 34, 35, 38, 41, 45,
     52, 62),
    0.054197,
)  # fmt: skip
"""Four bits, 256 states: half the error of a 4-bit scalar quantizer (search.py, 400 candidates, seed 1)."""

PRESETS: dict[str, TrellisCode] = {code.name: code for code in (LCC2_10, LCC2_12, LCC2_14, LCC4_12)}


def preset(name: str) -> TrellisCode:
    """The shipped code of that name; ConfigError where there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no trellis code {name!r}; there are {', '.join(PRESETS)}", name=name)
    return PRESETS[name]
