"""A matrix as it is stored: packed symbols, one scale a row, and what it takes to read them.

`decode` is the reference decoder: what every kernel must agree with, integer for integer.
It refuses sizes that do not fit the code. The meaning of each field is FORMAT.md's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from duomo.errors import ShapeMismatch
from duomo.trellis import hadamard, packing
from duomo.trellis.code import TrellisCode


@dataclass(frozen=True)
class TrellisTensor:
    """W[N, K] = unrotate(unit * row_scale[n] * level[n, k]).

    codes       uint8 [N*K*bits/8], `packing.pack`ed symbols
    row_scale   float16 [N]
    shape       (N, K)
    seed        of the sign vector; None: the inputs are not rotated
    chain       column blocks a stream runs through
    """

    code: TrellisCode
    codes: npt.NDArray[np.uint8]
    row_scale: npt.NDArray[np.float16]
    shape: tuple[int, int]
    seed: int | None
    chain: int = 1

    def __post_init__(self) -> None:
        rows, columns = self.shape
        packing.check_shape(rows, columns, self.code)
        wanted = rows * columns * self.code.bits // 8
        if self.codes.shape != (wanted,) or self.row_scale.shape != (rows,):
            raise ShapeMismatch(
                f"a {rows} x {columns} matrix in {self.code.name} has {wanted} bytes of codes and {rows} "
                f"scales, not {self.codes.shape} and {self.row_scale.shape}"
            )
        if self.chain < 1 or (columns // packing.BLOCK) % self.chain:
            raise ShapeMismatch(
                f"chains of {self.chain} do not divide the {columns // packing.BLOCK} column blocks"
            )

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.row_scale.nbytes

    def row_multiplier(self) -> npt.NDArray[np.float32]:
        """float32 [N]: unit * row_scale, what an integer accumulator is multiplied by."""
        return self.row_scale.astype(np.float32) * np.float32(self.code.unit)

    def levels(self) -> npt.NDArray[np.int8]:
        """int8 [N, K], the codebook values, in the rotated basis."""
        symbols = packing.unpack(self.codes, *self.shape, self.code)
        return symbols_to_levels(symbols, self.code, self.chain)

    def decode_rotated(self) -> npt.NDArray[np.float32]:
        return self.levels().astype(np.float32) * self.row_multiplier()[:, None]

    def decode(self) -> npt.NDArray[np.float32]:
        """float32 [N, K] in the original basis."""
        rotated = self.decode_rotated()
        return rotated if self.seed is None else hadamard.unrotate(rotated, self.seed)


def symbols_to_levels(symbols: npt.NDArray[np.uint8], code: TrellisCode, chain: int) -> npt.NDArray[np.int8]:
    """Symbols [N, K] -> codebook values [N, K], each stream read as a circle."""
    streams = packing.to_streams(symbols, chain).astype(np.uint8)
    levels = packing.from_streams(decode_streams(streams, code), symbols.shape[0], symbols.shape[1], chain)
    return levels.astype(np.int8, copy=False)


def decode_streams(symbols: npt.NDArray[np.uint8], code: TrellisCode) -> npt.NDArray[np.int8]:
    """Symbols [S, T] -> codebook values [S, T]. The window at step t holds symbols t, t-1, ..., modulo T."""
    windows = np.zeros(symbols.shape, np.uint16)
    for age in range(code.window // code.bits):
        windows |= np.roll(symbols, age, axis=1).astype(np.uint16) << np.uint16(code.bits * age)
    values: npt.NDArray[np.int8] = code.value_table()[windows]
    return values


@dataclass(frozen=True)
class TrellisBank:
    """E matrices of one shape, code and rotation: the experts of a layer.

    codes uint8 [E, N*K*bits/8]; row_scale float16 [E, N]; shape (E, N, K).
    """

    code: TrellisCode
    codes: npt.NDArray[np.uint8]
    row_scale: npt.NDArray[np.float16]
    shape: tuple[int, int, int]
    seed: int | None
    chain: int = 1

    def __post_init__(self) -> None:
        if not len(self.codes) == len(self.row_scale) == self.shape[0] > 0:
            raise ShapeMismatch(
                f"a bank of {self.shape[0]} matrices with {len(self.codes)} and {len(self.row_scale)} entries"
            )
        for expert in (0, self.shape[0] - 1):
            _ = self[expert]

    def __getitem__(self, expert: int) -> TrellisTensor:
        return TrellisTensor(
            self.code, self.codes[expert], self.row_scale[expert], self.shape[1:], self.seed, self.chain
        )

    @classmethod
    def of(cls, tensors: Sequence[TrellisTensor]) -> TrellisBank:
        first = tensors[0]
        same = all(
            (t.code, t.shape, t.seed, t.chain) == (first.code, first.shape, first.seed, first.chain)
            for t in tensors
        )
        assert same, "the matrices of a bank share code, shape, rotation and chain"
        return cls(
            first.code,
            np.stack([t.codes for t in tensors]),
            np.stack([t.row_scale for t in tensors]),
            (len(tensors), *first.shape),
            first.seed,
            first.chain,
        )

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.row_scale.nbytes

    def row_multiplier(self) -> npt.NDArray[np.float32]:
        """float32 [E, N]."""
        return self.row_scale.astype(np.float32) * np.float32(self.code.unit)

    def decode(self) -> npt.NDArray[np.float32]:
        """float32 [E, N, K] in the original basis."""
        return np.stack([self[expert].decode() for expert in range(self.shape[0])])
