"""Where the bits of a matrix lie: byte layout, streams and chains, in both directions.

A matrix W[N, K] is cut into column blocks of 16 inputs. Row n = 16 t + r: lane r, step t; a byte holds the
symbols of 8/bits consecutive steps, the earlier in the higher bits. In memory: [block, j, group, r, kk], so
64 bytes are 16 rows by 4 inputs of one group: one register, in the operand order of `vpdpbusd` and `sdot`.
A stream (r, kk) runs through the groups, then the blocks of a chain, and bites its own tail. Worth knowing:
only small matrices have chains longer than one block; a chain costs a kernel nothing but its start registers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from duomo.errors import ShapeMismatch
from duomo.trellis.code import TrellisCode

LANES = 16  # rows side by side in a register
BLOCK = 16  # inputs of a column block: 4 groups of 4
MIN_STEPS = {2: 128, 4: 64}
"""Shortest stream worth having. Tail-biting costs 7 % of the error at 64 steps of 2 bits, 1 % at 128 (L=12);
at 4 bits, where a window holds 3 symbols and not 6, it costs 2 % at 64."""

U8 = npt.NDArray[np.uint8]


def check_shape(rows: int, columns: int, code: TrellisCode) -> None:
    """ShapeMismatch unless a matrix of this shape can be packed."""
    if rows <= 0 or columns <= 0 or rows % code.row_multiple or columns % BLOCK:
        raise ShapeMismatch(
            f"a matrix of {rows} x {columns} cannot be stored in {code.name}: "
            f"rows must be a multiple of {code.row_multiple}, columns of {BLOCK}",
            rows=rows,
            columns=columns,
        )


def default_chain(rows: int, columns: int, code: TrellisCode) -> int:
    """Fewest column blocks a stream must run through to last MIN_STEPS; all of them where that is too few.

    A divisor of the number of blocks, so that all chains are alike.
    """
    check_shape(rows, columns, code)
    blocks, steps = columns // BLOCK, rows // 4
    return next(
        (c for c in range(1, blocks) if blocks % c == 0 and c * steps >= MIN_STEPS[code.bits]), blocks
    )


def pack(symbols: U8, code: TrellisCode) -> U8:
    """Symbols [N, K] in [0, 2^bits) -> N*K*bits/8 bytes."""
    rows, columns = symbols.shape
    check_shape(rows, columns, code)
    per_byte = code.codes_per_byte
    split = symbols.reshape(rows // code.row_multiple, per_byte, LANES, columns // BLOCK, 4, 4)
    ordered = split.transpose(3, 0, 4, 2, 5, 1)  # block, j, group, r, kk | phase
    out = np.zeros(ordered.shape[:-1], np.uint8)
    for phase in range(per_byte):
        out |= ordered[..., phase] << np.uint8(8 - code.bits * (phase + 1))
    return out.reshape(-1)


def unpack(packed: U8, rows: int, columns: int, code: TrellisCode) -> U8:
    """The inverse of `pack`."""
    check_shape(rows, columns, code)
    per_byte, steps = code.codes_per_byte, rows // code.row_multiple
    split = packed.reshape(columns // BLOCK, steps, 4, LANES, 4)
    mask = np.uint8((1 << code.bits) - 1)
    phases = [(split >> np.uint8(8 - code.bits * (phase + 1))) & mask for phase in range(per_byte)]
    ordered = np.stack(phases, axis=-1)
    return np.ascontiguousarray(ordered.transpose(1, 5, 3, 0, 2, 4)).reshape(rows, columns)


def to_streams(matrix: npt.NDArray[np.generic], chain: int) -> npt.NDArray[np.generic]:
    """[N, K] -> [K/16/chain * 64, T]: streams ordered by chain, kk, r; T = chain * N / 4 steps."""
    rows, columns = matrix.shape
    split = matrix.reshape(rows // LANES, LANES, columns // BLOCK // chain, chain, 4, 4)
    # chain, kk, r | block in chain, group, step
    return np.ascontiguousarray(split.transpose(2, 5, 1, 3, 4, 0)).reshape(-1, chain * rows // 4)


def from_streams(
    streams: npt.NDArray[np.generic], rows: int, columns: int, chain: int
) -> npt.NDArray[np.generic]:
    """The inverse of `to_streams`."""
    split = streams.reshape(columns // BLOCK // chain, 4, LANES, chain, 4, rows // LANES)
    return np.ascontiguousarray(split.transpose(5, 2, 0, 3, 4, 1)).reshape(rows, columns)
