"""Encoding: streams of targets to symbols, and whole matrices without error feedback.

The C++ encoder is used where it was built; the numpy one finds the same symbols a thousand times slower.
Feedback between columns, which needs a Hessian, is `duomo.quant.feedback`'s.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from duomo.env import CPU_ISA
from duomo.errors import ConfigError
from duomo.trellis import hadamard, packing, viterbi
from duomo.trellis.code import LCC2_12, LUT_OFFSET, TrellisCode
from duomo.trellis.tensor import TrellisTensor, decode_streams

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def native() -> Any:
    """The compiled module where it exists and has the encoder, else None."""
    try:
        module = importlib.import_module("duomo._native")
    except ImportError:
        return None
    return module if hasattr(module, "viterbi_encode") else None


def encode(
    targets: F32,
    code: TrellisCode,
    seam_steps: int = viterbi.SEAM_STEPS,
    num_threads: int = 1,
    num_turns: int = viterbi.NUM_TURNS,
) -> U8:
    """Targets [S, T] in codebook units -> symbols [S, T] of tail-biting streams.

    The native encoder works on 32 streams at once; `num_threads` splits the rest. Same result everywhere.
    """
    fixed = viterbi.fixed_point(targets, code)
    module = native()
    if module is None:
        return viterbi.encode_fixed(fixed, code, seam_steps, num_turns)
    return encode_native(module, fixed, code, seam_steps, num_threads, CPU_ISA.get(), num_turns)


def encode_native(
    module: Any,
    fixed: npt.NDArray[np.uint16],
    code: TrellisCode,
    seam_steps: int,
    num_threads: int,
    isa: str,
    num_turns: int = viterbi.NUM_TURNS,
) -> U8:
    """`viterbi.encode_fixed` by the compiled module, its instruction set capped by `isa`."""
    columns = np.asarray(code.columns, np.uint8)
    levels = (np.asarray(code.codebook, np.int32) + LUT_OFFSET) << viterbi.FRACTION_BITS[code.bits]
    symbols: U8 = module.viterbi_encode(
        np.ascontiguousarray(fixed),
        columns,
        levels.astype(np.uint16),
        code.bits,
        seam_steps,
        num_turns,
        num_threads,
        isa,
    )
    return symbols


def encode_matrix(
    weight: F32,
    code: TrellisCode = LCC2_12,
    seed: int | None = 0,
    chain: int | None = None,
    num_threads: int = 1,
) -> TrellisTensor:
    """Rounds a matrix [N, K] to the nearest decodable one, row by row, in the plain squared error.

    seed None leaves the inputs unrotated. ConfigError for weights that are not finite.
    """
    if not np.isfinite(weight).all():
        raise ConfigError("weights to encode hold NaN or infinity; they must be finite")
    rows, columns = weight.shape
    chain = packing.default_chain(rows, columns, code) if chain is None else chain
    rotated = weight.astype(np.float32) if seed is None else hadamard.rotate(weight, seed)
    scale = row_rms(rotated)
    targets = packing.to_streams(rotated / (scale[:, None] * np.float32(code.unit)), chain)
    symbols = encode(targets.astype(np.float32), code, num_threads=num_threads)
    levels = packing.from_streams(decode_streams(symbols, code), rows, columns, chain)
    return TrellisTensor(
        code=code,
        codes=packing.pack(packing.from_streams(symbols, rows, columns, chain).astype(np.uint8), code),
        row_scale=fit_scales(rotated, levels.astype(np.float32), code),
        shape=(rows, columns),
        seed=seed,
        chain=chain,
    )


def row_rms(rotated: F32) -> F32:
    """[N] root mean square of each row as its float16 will be; 1 for a row of zeros."""
    rms = np.sqrt(np.mean(np.square(rotated, dtype=np.float64), axis=1))
    scale = np.clip(rms, 2.0**-24, 65504).astype(np.float16).astype(np.float32)
    return np.where(rms > 0, scale, np.float32(1))


def fit_scales(rotated: F32, levels: F32, code: TrellisCode) -> npt.NDArray[np.float16]:
    """The scales that minimise the squared error of each row, given its levels. Zero for a row of zeros."""
    above = np.einsum("nk,nk->n", rotated, levels, dtype=np.float64)
    below = np.einsum("nk,nk->n", levels, levels, dtype=np.float64) * code.unit
    ratio = np.clip(above / np.maximum(below, 1e-30), -65504, 65504)
    scales: npt.NDArray[np.float16] = ratio.astype(np.float16)
    return scales
