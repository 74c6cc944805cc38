"""Products with plain fp32 matrices by csrc/dense.cpp: a row's bits depend on the row alone."""

from __future__ import annotations

import torch
from torch import Tensor


def takes(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """Inference over fp32 rows; anything else is torch's."""
    return (
        not torch.is_grad_enabled()
        and x_TK.dtype == weight_NK.dtype == torch.float32
        and x_TK.ndim == 2
        and x_TK.shape[1] == weight_NK.shape[1]
        and weight_NK.is_contiguous()
    )


def dense_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T, fp32 [T, N]."""
    from duomo import _native

    x = x_TK.contiguous()
    (tokens, columns), rows = x.shape, weight_NK.shape[0]
    out = torch.empty(tokens, rows)
    _native.dense_linear(weight_NK.data_ptr(), 0, rows, columns, x.data_ptr(), tokens, out.data_ptr())
    return out
