"""Products with plain matrices by csrc/dense.cpp: a row's bits depend on the row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.kernels.weights import DenseWeight


def takes(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """Inference over fp32 rows; anything else is torch's."""
    return (
        not torch.is_grad_enabled()
        and x_TK.dtype == weight_NK.dtype == torch.float32
        and x_TK.ndim == 2
        and x_TK.shape[1] == weight_NK.shape[1]
        and weight_NK.is_contiguous()
    )


def dense_linear(x_TK: Tensor, weight: DenseWeight) -> Tensor:
    """x W^T + bias, fp32 [T, N]."""
    x = x_TK.contiguous()
    out = torch.empty(len(x), len(weight.weight))
    weight.native.linear(x.data_ptr(), len(x), out.data_ptr())
    return out
