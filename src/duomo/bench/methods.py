"""Ways to quantize matrices, all with one signature, so that a study can put them side by side.

Each takes weights [E, N, K] and the second moments of their inputs [E, K, K] and returns the decoded weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from duomo.bench.ggml import Ggml
from duomo.quant.feedback import feed_back, fit_scales, inverse_factor, quantize_bank
from duomo.quant.hessian import damp, rotate, rotate_hessian
from duomo.trellis import LCC2_10, LCC2_12, LCC2_14
from duomo.trellis.code import TrellisCode

Method = Callable[[Tensor, Tensor], Tensor]
LLOYD_MAX = (-1.5104, -0.4528, 0.4528, 1.5104)
"""The four levels of least squared error for a unit Gaussian."""


def trellis(code: TrellisCode, damping: float, has_feedback: bool = True, seed: int | None = 5) -> Method:
    """Ours; seed None leaves the inputs unrotated."""

    def method(weights: Tensor, hessians: Tensor) -> Tensor:
        own = quantize_bank(weights, list(hessians), code, seed, damping, 1, has_feedback)
        return torch.stack([torch.from_numpy(tensor.decode()) for tensor in own])

    return method


def scalar(damping: float, has_feedback: bool = True, seed: int | None = 5) -> Method:
    """GPTQ with the four Lloyd-Max levels, a scale a row and our rotation; feedback column by column.

    As ours it sweeps twice, the second time with the row scales that the first found best.
    """
    levels = torch.tensor(LLOYD_MAX)

    def method(weights: Tensor, hessians: Tensor) -> Tensor:
        source, hessians = rotate(weights, seed).contiguous(), rotate_hessian(hessians, seed)
        scale = source.square().mean(-1, keepdim=True).sqrt()
        columns = weights.shape[-1]
        upper = inverse_factor(hessians, damping) if has_feedback else torch.eye(columns).expand_as(hessians)

        def nearest(first: int, last: int, targets: Tensor) -> Tensor:
            return levels[((targets / scale)[..., None] - levels).abs().argmin(-1)] * scale

        for _ in range(2):
            rounded = source.clone()
            feed_back(rounded, upper, 1, nearest)
            fitted = fit_scales(source, rounded / scale, damp(hessians, damping), 1.0)[..., None]
            found, scale = rounded / scale * fitted, fitted
        return found @ rotate(torch.eye(columns), seed).T

    return method


def ggml(library: Ggml, kind: str) -> Method:
    """ggml's own quantizer with the diagonal of the second moments as its importance matrix."""

    def method(weights: Tensor, hessians: Tensor) -> Tensor:
        pairs = zip(weights, hessians, strict=True)
        opened = [library.round_trip(w.numpy(), kind, h.diagonal().numpy()) for w, h in pairs]
        return torch.from_numpy(np.stack(opened))

    return method


def ablations(damping: float) -> dict[str, Method]:
    """Ours at three windows, and ours with one thing left out."""
    return {
        "LCC2 L=12": trellis(LCC2_12, damping),
        "LCC2 L=10": trellis(LCC2_10, damping),
        "LCC2 L=14": trellis(LCC2_14, damping),
        "L=12, no feedback": trellis(LCC2_12, damping, has_feedback=False),
        "L=12, no rotation": trellis(LCC2_12, damping, seed=None),
        "scalar Lloyd-Max, feedback, rotation": scalar(damping),
        "scalar Lloyd-Max, rotation, no feedback": scalar(damping, has_feedback=False),
    }
