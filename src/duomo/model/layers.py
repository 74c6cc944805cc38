"""The two layers everything is made of: a linear map and an RMSNorm. Weights are [out, in].

`Linear` is the seam where packed weights enter: `model.packed.PackedLinear` has the same call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duomo import kernels


class Linear(nn.Module):
    """y = x W^T + b."""

    def __init__(self, in_size: int, out_size: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.empty(out_size)) if has_bias else None
        self.panels: kernels.DenseWeight | None = None  # of both, in service (`model.plain_vision`)

    def forward(self, x: Tensor) -> Tensor:
        if self.panels is not None and x.dtype == torch.float32 and not torch.is_grad_enabled():
            return kernels.dense_linear(x, self.panels)
        return kernels.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rmsnorm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layernorm(x, self.weight, self.bias, self.eps)
