"""Plain integers with one scale a row: embeddings, heads and the vision tower, where bits are cheap.

8 bits in [-127, 127] or 6 in [-31, 31], rotated like the trellis tensors so that int8 activations serve both.
Six-bit levels stay four to three bytes from the file into the kernels: only `levels` opens them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from duomo.errors import ConfigError, ShapeMismatch
from duomo.trellis import hadamard

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class IntTensor:
    """W[..., N, K] = unrotate(row_scale[..., n] * levels[..., n, k]).

    codes int8 [..., N, K] at 8 bits, uint8 [..., N, 3K/4] at 6 (`pack_six`); row_scale float16 [..., N];
    seed of the rotation, None where there is none.
    """

    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    row_scale: npt.NDArray[np.float16]
    bits: int
    seed: int | None

    def __post_init__(self) -> None:
        if self.bits not in (6, 8):
            raise ConfigError(f"integers of {self.bits} bits; there are 6 and 8")
        if self.codes.dtype != (np.int8 if self.bits == 8 else np.uint8):
            raise ConfigError(f"{self.bits} bits as {self.codes.dtype}; 8 are int8, 6 are packed into uint8")
        if self.codes.shape[:-1] != self.row_scale.shape:
            raise ShapeMismatch(f"{self.row_scale.shape} scales for codes of {self.codes.shape}")
        if self.bits == 6 and self.codes.shape[-1] % 3:
            raise ShapeMismatch(f"rows of {self.codes.shape[-1]} bytes; six-bit levels take three for four")

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits)

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.row_scale.nbytes

    def levels(self) -> npt.NDArray[np.int8]:
        """int8 [..., N, K], in the rotated basis."""
        return unpack_six(self.codes.view(np.uint8)) if self.bits == 6 else self.codes.view(np.int8)

    def row_multiplier(self) -> F32:
        return self.row_scale.astype(np.float32)

    def decode(self) -> F32:
        """float32 in the original basis."""
        rotated = self.levels().astype(np.float32) * self.row_multiplier()[..., None]
        return rotated if self.seed is None else hadamard.unrotate(rotated, self.seed)


def int_tensor(
    levels: npt.NDArray[np.int8], row_scale: npt.NDArray[np.float16], bits: int, seed: int | None
) -> IntTensor:
    """Of levels int8 [..., N, K], packed where they have 6 bits."""
    return IntTensor(pack_six(levels) if bits == 6 else levels, row_scale, bits, seed)


def encode_int(weight: F32, bits: int = 8, seed: int | None = 0) -> IntTensor:
    """Rounds each row to `bits` bits; the largest value of a row is its largest level.

    Of the scales tried for 6 bits, each row keeps the one of least squared error. ConfigError unless finite,
    ShapeMismatch for six bits of rows that are no multiple of 4.
    """
    if not np.isfinite(weight).all():
        raise ConfigError("weights to encode hold NaN or infinity; they must be finite")
    rotated = weight.astype(np.float32) if seed is None else hadamard.rotate(weight, seed)
    most = (1 << (bits - 1)) - 1
    peak = np.abs(rotated).max(-1, keepdims=True) / most
    best = np.full(peak.shape, np.inf, np.float32)
    levels, scale = np.zeros(rotated.shape, np.int8), np.ones(peak.shape, np.float16)
    for shrink in (1.0,) if bits == 8 else (1.0, 0.9, 0.8, 0.7):
        tried = np.clip(peak * np.float32(shrink), 2.0**-24, 65504).astype(np.float16)
        rounded = np.clip(np.rint(rotated / tried.astype(np.float32)), -most, most)
        error = np.square(rounded * tried.astype(np.float32) - rotated).sum(-1, keepdims=True)
        better = error < best
        best = np.where(better, error, best)
        levels = np.where(better, rounded.astype(np.int8), levels)
        scale = np.where(better, tried, scale)
    return int_tensor(levels, scale[..., 0], bits, seed)


def pack_six(levels: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """int8 [..., K] in [-31, 31], K % 4 == 0 -> uint8 [..., 3K/4]: four levels plus 32, low bits first."""
    if levels.shape[-1] % 4:
        raise ShapeMismatch(f"rows of {levels.shape[-1]} six-bit levels; it must be a multiple of 4")
    *outer, width = levels.shape
    a, b, c, d = np.moveaxis((levels + 32).astype(np.uint8).reshape(*outer, width // 4, 4), -1, 0)
    return np.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), axis=-1).reshape(*outer, width // 4 * 3)


def unpack_six(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """The inverse of `pack_six`."""
    *outer, width = packed.shape
    threes = packed.reshape(*outer, width // 3, 3)
    x, y, z = threes[..., 0], threes[..., 1], threes[..., 2]
    fours = np.empty((*outer, width // 3, 4), np.uint8)
    fours[..., 0], fours[..., 1], fours[..., 2], fours[..., 3] = x, x >> 6 | y << 2, y >> 4 | z << 4, z >> 2
    fours &= 63
    return fours.reshape(*outer, width // 3 * 4).view(np.int8) - np.int8(32)
