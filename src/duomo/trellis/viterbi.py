"""The encoder, plainly, in numpy: the specification of csrc/viterbi.hpp, integer for integer.

Given targets in codebook units it finds, for each stream, symbols whose decoded circle is near the targets.
All arithmetic is saturating uint16, so that any machine finds the same symbols. Worth knowing: a metric's low
`bits` bits carry the predecessor it came from, so one minimum yields both the survivor and its past.

Tail-biting: a first pass runs across the seam with a free start and looks at the state in which the best path
crosses it; the second starts and ends in that state. The seam then turns: each further pass is pinned to the
state of the path so far at another place of the circle, so it can only find a nearer circle.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from duomo.trellis.code import LUT_OFFSET, TrellisCode

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]

SEAM_STEPS = 512
"""Steps of the first pass, half of them on each side of the seam, at most once around each way.

Distortion of L=12 at T=256 with 128, 256, 512: .0695, .0691, .0690; of L=14: .0687, .0682, .0679."""

NUM_TURNS = 2
"""Pinned passes: the seam at the start of the stream, then at its middle."""

FRACTION_BITS = {2: 8, 4: 9}
"""Targets are fixed-point with this many fractional bits.

The cost of an error of r units is the high half of a 16-bit square: r^2 at 8 bits, 4 r^2 at 9. At the codes'
own distortion that is about 40 a step at 2 bits and 8 at 4 bits: coarser would cost quality, and finer would
saturate, since the `bits` low bits of the 16 belong to the predecessor.
"""


def fixed_point(targets: npt.NDArray[np.float32], code: TrellisCode) -> U16:
    """Targets in codebook units -> uint16, clipped to the range of the codebook bytes."""
    scale = np.float32(1 << FRACTION_BITS[code.bits])
    shifted = np.rint((targets.astype(np.float32) + np.float32(LUT_OFFSET)) * scale)
    fixed: U16 = np.clip(shifted, 0, 2 * LUT_OFFSET * scale - 1).astype(np.uint16)
    return fixed


def encode_fixed(
    targets: U16, code: TrellisCode, seam_steps: int = SEAM_STEPS, num_turns: int = NUM_TURNS
) -> U8:
    """Fixed-point targets [S, T] -> symbols [S, T]."""
    num_steps = targets.shape[1]
    if targets.size == 0:
        return np.zeros(targets.shape, np.uint8)
    half = min(seam_steps // 2, num_steps)
    across = np.concatenate((targets[:, num_steps - half :], targets[:, :half]), axis=1)
    free = np.zeros((code.num_states, targets.shape[0]), np.uint16)
    metrics, decisions = _forward(across, free, code)
    _, seam = _trace_back(decisions, (metrics >> code.bits).argmin(0), code, half)
    symbols = _pinned(targets, seam, code)
    for turn in range(1, num_turns):
        start = num_steps * turn // num_turns
        turned = np.roll(symbols, -start, axis=1)
        symbols = np.roll(
            _pinned(np.roll(targets, -start, axis=1), _state_before(turned, code), code), start, axis=1
        )
    return symbols


def _pinned(targets: U16, seam: npt.NDArray[np.int64], code: TrellisCode) -> U8:
    """The nearest circle that starts and ends in the states `seam` [S]."""
    metrics = np.full((code.num_states, seam.size), 0xFFFF, np.uint16)
    metrics[seam, np.arange(seam.size)] = 0
    _, decisions = _forward(targets, metrics, code)
    symbols, _ = _trace_back(decisions, seam, code, targets.shape[1])
    return symbols


def _state_before(symbols: U8, code: TrellisCode) -> npt.NDArray[np.int64]:
    """[S] the state in which a circle of symbols passes its start."""
    state = np.zeros(symbols.shape[0], np.int64)
    for age in range(code.window // code.bits - 2, -1, -1):
        state = state << code.bits | symbols[:, (-1 - age) % symbols.shape[1]]
    return state


def _forward(targets: U16, metrics: U16, code: TrellisCode) -> tuple[U16, U8]:
    """Runs the trellis. Metrics [states, S] in and out; decisions [T, states, S]."""
    bits, size = code.bits, code.num_states
    branches = 1 << bits
    windows = np.arange(size)[:, None] + (np.arange(branches) << (code.window - bits))[None, :]
    index = code.hash_table()[
        windows
    ]  # [new state, predecessor]: the whole window is (predecessor, new state)
    came_from = (np.arange(size)[:, None] >> bits) + (np.arange(branches) << (code.window - 2 * bits))
    clear = np.uint16(~(branches - 1) & 0xFFFF)
    levels = (np.asarray(code.codebook, np.int64) + LUT_OFFSET) << FRACTION_BITS[bits]
    decisions = np.empty((targets.shape[1], size, targets.shape[0]), np.uint8)
    for step in range(targets.shape[1]):
        error = np.abs(targets[None, :, step].astype(np.int64) - levels[:, None])
        cost = np.minimum((error * error >> 16) << bits, 0xFFFF) & clear
        base = (metrics - (metrics.min(0) & clear)) & clear
        tagged = base[came_from].astype(np.int64) + np.arange(branches)[None, :, None]
        metrics = np.minimum(tagged + cost[index], 0xFFFF).min(1).astype(np.uint16)
        decisions[step] = metrics & (branches - 1)
    return metrics, decisions


def _trace_back(
    decisions: U8, last: npt.NDArray[np.int64], code: TrellisCode, stop: int
) -> tuple[U8, npt.NDArray[np.int64]]:
    """Symbols of the last `stop` steps, and the state before them, from the final states [S]."""
    num_steps, _, num_streams = decisions.shape
    state, lanes = last.copy(), np.arange(num_streams)
    symbols = np.empty((num_streams, stop), np.uint8)
    for step in range(num_steps - 1, num_steps - stop - 1, -1):
        symbols[:, step - (num_steps - stop)] = state & ((1 << code.bits) - 1)
        oldest = decisions[step, state, lanes].astype(np.int64)
        state = (state >> code.bits) | (oldest << (code.window - 2 * code.bits))
    return symbols, state
