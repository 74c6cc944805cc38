"""Ways to quantize one matrix, all with one signature, so that a study can put them side by side.

Each takes a weight [N, K] and the second moments of its inputs [K, K] and returns the decoded weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duomo.bench.ggml import Ggml
from duomo.quant.feedback import feed_back, fit_scales, inverse_factor, quantize_matrices
from duomo.quant.hessian import damp, rotate, rotate_hessian
from duomo.trellis import LCC2_10, LCC2_12, LCC2_14
from duomo.trellis.code import TrellisCode

Method = Callable[[Tensor, Tensor], Tensor]
LLOYD_MAX = (-1.5104, -0.4528, 0.4528, 1.5104)
"""The four levels of least squared error for a unit Gaussian."""


def trellis(code: TrellisCode, damping: float, has_feedback: bool = True, seed: int | None = 5) -> Method:
    """Ours; seed None leaves the inputs unrotated."""

    def method(weight: Tensor, hessian: Tensor) -> Tensor:
        own = quantize_matrices(weight[None], hessian[None], code, seed, damping, 2, has_feedback)
        return torch.from_numpy(own[0].decode())

    return method


def scalar(damping: float, has_feedback: bool = True, seed: int | None = 5) -> Method:
    """GPTQ with the four Lloyd-Max levels, a scale a row and our rotation; feedback column by column.

    As ours it sweeps twice, the second time with the row scales that the first found best.
    """
    levels = torch.tensor(LLOYD_MAX)

    def method(weight: Tensor, hessian: Tensor) -> Tensor:
        source = rotate(weight, seed)[None].contiguous()
        scale = source.square().mean(-1, keepdim=True).sqrt()
        turned_hessian = rotate_hessian(hessian, seed)[None]
        upper = inverse_factor(turned_hessian, damping)
        if not has_feedback:
            upper = torch.eye(weight.shape[1])[None]

        def nearest(first: int, last: int, targets: Tensor) -> Tensor:
            return levels[((targets / scale)[..., None] - levels).abs().argmin(-1)] * scale

        for _ in range(2):
            rounded = source.clone()
            feed_back(rounded, upper, 1, nearest)
            fitted = fit_scales(source, rounded / scale, damp(turned_hessian, damping), 1.0)[..., None]
            found, scale = rounded / scale * fitted, fitted
        signs_back = rotate(torch.eye(weight.shape[1]), seed)
        return found[0] @ signs_back.T

    return method


def ggml(library: Ggml, kind: str) -> Method:
    """ggml's own quantizer with the diagonal of the second moments as its importance matrix."""

    def method(weight: Tensor, hessian: Tensor) -> Tensor:
        return torch.from_numpy(library.round_trip(weight.numpy(), kind, hessian.diagonal().numpy()))

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
