"""The rotation of inputs: random signs, then a Hadamard transform of each block of 128.

It makes the weights Gaussian, which the codes assume, and spreads the outliers of activations, which int8
cannot afford: without it int8 costs forty times more (spec 4.3). It is orthonormal, applied to both sides,
so products do not change. Widths that 128 does not divide take the largest power of two that does.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
MAX_BLOCK = 128
_MASK = (1 << 64) - 1


def block_size(width: int) -> int:
    """Largest power of two, at most 128, that divides the width. Also the block of int8 activations."""
    return min(width & -width, MAX_BLOCK)


def signs(seed: int, width: int) -> F32:
    """[width] of +1 and -1: bit k%64 of the (k//64)-th output of splitmix64(seed), -1 where it is set."""
    words, state = [], seed & _MASK
    for _ in range((width + 63) // 64):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        words.append(z ^ (z >> 31))
    bits = np.unpackbits(np.array(words, "<u8").view(np.uint8), bitorder="little")[:width]
    return np.float32(1) - np.float32(2) * bits.astype(np.float32)


def transform(x: F32) -> F32:
    """Orthonormal Hadamard transform of each block of the last axis; its own inverse."""
    block = block_size(x.shape[-1])
    y = np.asarray(x, np.float32)
    half = 1
    while half < block:
        pairs = y.reshape(-1, block // (2 * half), 2, half)
        y = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
        half *= 2
    return y.reshape(x.shape) * np.float32(block**-0.5)


def rotate(x: F32, seed: int) -> F32:
    """x[..., K] -> H (signs * x). Of weights [N, K] and of activations alike."""
    return transform(x * signs(seed, x.shape[-1]))


def unrotate(x: F32, seed: int) -> F32:
    """The inverse of `rotate`."""
    return transform(x) * signs(seed, x.shape[-1])
