"""RMSNorm and LayerNorm as ERNIE computes them: statistics in fp32, the result in the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] -> the same shape. The cast back comes before the weight (spec 3.1)."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x [..., C] -> the same shape."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
