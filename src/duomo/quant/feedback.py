"""Error feedback: columns are rounded a few at a time, and the rest move to make up for what was lost (LDLQ).

With H^-1 = U^T U (U upper triangular), rounding block b of the columns with error D_b is best answered by
moving the columns after it by -D_b U_bb^-1 U_b,rest. A block is what one set of tail-biting streams covers: 4
columns of each column block of a chain. Within a block there is no feedback: a trellis decides late. Worth
knowing: blocks of 4 are as good as exact and 2-5 % better than 16, which is why streams are 4 columns wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from duomo.errors import ConfigError
from duomo.quant.hessian import damp, rotate, rotate_hessian
from duomo.trellis import packing
from duomo.trellis.code import TrellisCode
from duomo.trellis.encoder import encode
from duomo.trellis.tensor import TrellisTensor, decode_streams

Round = Callable[[int, int, Tensor], Tensor]
"""(first column, last column + 1, targets [E, N, B]) -> their rounded values."""

AT_ONCE = 2
"""Experts encoded side by side: their 16 streams each fill the encoder's 32 lanes."""

LAZY_COLUMNS = 128
"""Columns whose feedback to the far ones is applied in one product."""


def column_order(columns: int, chain: int) -> Tensor:
    """The order of rounding: chain, kk, block in chain, group. Runs of 4 * chain columns are one block."""
    index: Tensor = torch.arange(columns).unflatten(0, (-1, chain, 4, 4))  # chain, block, group, kk
    return index.permute(0, 3, 1, 2).flatten()


def feed_back(weights_ENK: Tensor, upper_EKK: Tensor, block: int, round_block: Round) -> None:
    """Rounds all columns in order, `block` at a time. Changes `weights_ENK`, which it leaves rounded."""
    columns = weights_ENK.shape[-1]
    lazy = max(block, LAZY_COLUMNS // block * block)
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = torch.zeros_like(weights_ENK[:, :, start:stop])
        for first in range(start, stop, block):
            last = first + block
            targets = weights_ENK[:, :, first:last]
            rounded = round_block(first, last, targets)
            inner = upper_EKK[:, first:last, first:last]
            error = torch.linalg.solve_triangular(inner, targets - rounded, upper=True, left=False)
            weights_ENK[:, :, last:stop] -= error @ upper_EKK[:, first:last, last:stop]
            weights_ENK[:, :, first:last] = rounded
            errors[:, :, first - start : last - start] = error
        weights_ENK[:, :, stop:] -= errors @ upper_EKK[:, start:stop, stop:]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U of H^-1 = U^T U for damped H [..., K, K]; more damping where even that is not positive definite."""
    if not bool(hessian.isfinite().all()):
        raise ConfigError("a Hessian is not finite; calibration inputs hold NaN or infinity")
    for attempt in range(8):
        lower, info = torch.linalg.cholesky_ex(damp(hessian, damping * 4**attempt))
        if not bool(info.any()):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(info.any()):
                return upper  # type: ignore[no-any-return]
    raise ConfigError(f"a Hessian is not positive definite even when damped by {damping * 4**7:.1f}")


def quantize_matrices(
    weights_ENK: Tensor,
    hessians_EKK: Tensor,
    code: TrellisCode,
    seed: int | None,
    damping: float,
    num_threads: int = 1,
    has_feedback: bool = True,
    sweeps: int = 2,
) -> list[TrellisTensor]:
    """E matrices of one shape, each against its own Hessian (original basis, undamped), with one rotation.

    The second sweep repeats the first with the row scales that the first found best.
    """
    num_experts, rows, columns = weights_ENK.shape
    if not bool(weights_ENK.isfinite().all()):
        raise ConfigError("weights to quantize hold NaN or infinity; they must be finite")
    chain = packing.default_chain(rows, columns, code)
    order = column_order(columns, chain)
    hessians = rotate_hessian(hessians_EKK.float(), seed)[:, order][:, :, order]
    weights = rotate(weights_ENK.float(), seed)[:, :, order].contiguous()
    upper = inverse_factor(hessians, damping) if has_feedback else _identity(hessians)
    metric = damp(hessians, damping)
    scale = _representable(weights.square().mean(-1).sqrt())
    symbols = np.empty((num_experts, rows, columns), np.uint8)
    levels = torch.empty_like(weights)
    for _ in range(sweeps):
        _sweep(weights.clone(), upper, 4 * chain, scale, code, symbols, levels, num_threads)
        scale = fit_scales(weights, levels, metric, code.unit)
    back = order.argsort().numpy()
    return [
        TrellisTensor(
            code=code,
            codes=packing.pack(np.ascontiguousarray(symbols[expert][:, back]), code),
            row_scale=scale[expert].numpy().astype(np.float16),
            shape=(rows, columns),
            seed=seed,
            chain=chain,
        )
        for expert in range(num_experts)
    ]


def quantize_bank(
    weights_ENK: Tensor,
    hessians: Sequence[Tensor],
    code: TrellisCode,
    seed: int | None,
    damping: float,
    num_threads: int = 1,
    has_feedback: bool = True,
    sweeps: int = 2,
) -> list[TrellisTensor]:
    """`quantize_matrices` of many experts, a few at a time on each thread.

    Faster than threads within one call: nearly everything between two encodings is too small to be shared.
    A bank's result does not depend on the number of threads.
    """
    if len(weights_ENK) == 1:
        (hessian,) = hessians
        return quantize_matrices(
            weights_ENK, hessian[None], code, seed, damping, num_threads, has_feedback, sweeps
        )

    def some(first: int) -> list[TrellisTensor]:
        own = slice(first, first + AT_ONCE)
        stacked = torch.stack(list(hessians[own]))
        return quantize_matrices(weights_ENK[own], stacked, code, seed, damping, 1, has_feedback, sweeps)

    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(num_threads)
    try:
        groups = list(pool.map(some, range(0, len(weights_ENK), AT_ONCE)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for experts half done
        torch.set_num_threads(torch_threads)
    return [tensor for group in groups for tensor in group]


def _sweep(
    weights: Tensor,
    upper: Tensor,
    block: int,
    scale: Tensor,
    code: TrellisCode,
    symbols: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    levels: Tensor,
    num_threads: int,
) -> None:
    num_experts, rows, _ = weights.shape
    step = torch.where(scale != 0, scale, 1.0)[:, :, None] * code.unit
    split = (num_experts, packing.LANES, block, rows // packing.LANES)

    def round_block(first: int, last: int, targets: Tensor) -> Tensor:
        # Row n = 16 t + r: streams are (expert, r), their steps (column, t).
        lanes = (targets / step).unflatten(1, (-1, packing.LANES)).permute(0, 2, 3, 1)
        streams = np.ascontiguousarray(lanes.numpy()).reshape(num_experts * packing.LANES, -1)
        found = encode(streams, code, num_threads=num_threads)
        values = decode_streams(found, code)
        place = np.s_[:, :, first:last]
        symbols[place] = found.reshape(split).transpose(0, 3, 1, 2).reshape(num_experts, rows, block)
        ordered = values.reshape(split).transpose(0, 3, 1, 2).reshape(num_experts, rows, block)
        levels[place] = torch.from_numpy(ordered.astype(np.float32))
        return levels[place] * step

    feed_back(weights, upper, block, round_block)


def fit_scales(weights: Tensor, levels: Tensor, metric: Tensor, unit: float) -> Tensor:
    """[E, N] the row scales that minimise the error in the metric, (w H q) / (q H q), as float16 has them."""
    seen = levels @ metric
    above, below = (seen * weights).sum(-1), (seen * levels).sum(-1)
    return _representable(above / (below * unit).clamp(min=1e-30))


def output_error(original: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T), the share of the outputs' energy that rounding loses."""
    error = original - decoded
    return float((error @ hessian * error).sum() / (original @ hessian * original).sum().clamp(min=1e-30))


def _representable(scale: Tensor) -> Tensor:
    return scale.clamp(-65504, 65504).half().float()


def _identity(hessians: Tensor) -> Tensor:
    return torch.eye(hessians.shape[-1]).expand_as(hessians)
