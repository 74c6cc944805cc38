"""A linear map whose every row is computed as if it were alone, whatever rows stand beside it.

In inference, fp32 products take rows in multiples of 16 (zero rows fill up); this makes results bit-equal.
Measured with torch 2.13 on AVX-512: MKL takes other summation orders for 1, for 2-3 and for a thread's last
odd row; from 16 rows on, in multiples of 16, and in bf16 at any count, a row's bits are always the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from duomo.kernels.weights import DenseForm, DenseWeight

ROW_BLOCK = 16


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b; x is [..., K]. With gradients, on a GPU or below fp32, plain torch."""
    is_plain = torch.is_grad_enabled() or x_TK.dtype != torch.float32 or x_TK.device.type != "cpu"
    num_rows = x_TK.shape[0]
    if is_plain or x_TK.ndim != 2 or num_rows % ROW_BLOCK == 0:
        return F.linear(x_TK, weight_NK, bias_N)
    padded = F.pad(x_TK, (0, 0, 0, -num_rows % ROW_BLOCK))
    return F.linear(padded, weight_NK, bias_N)[:num_rows]


def panel_linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, is_rounded: bool = False
) -> Tensor:
    """x W^T + b over weights of bf16, as csrc/dense.hpp's panels add: the specification, slow on purpose.

    Pairs of columns in rising order, of each the odd one first. A product of two bf16 numbers is exact in
    fp32, so with `is_rounded` x this is what vdpbf16ps computes.
    """
    weight_NK = weight_NK.bfloat16().float()
    x_TK = x_TK.bfloat16().float() if is_rounded else x_TK
    sums_TN = torch.zeros(x_TK.shape[0], weight_NK.shape[0])
    num_columns = x_TK.shape[1]
    for even in range(0, num_columns, 2):
        for column in (even + 1, even):
            if column < num_columns:
                sums_TN = sums_TN + x_TK[:, column, None] * weight_NK[:, column]
    return sums_TN if bias_N is None else sums_TN + bias_N


def dense_linear(x_TK: Tensor, weight: DenseWeight) -> Tensor:
    """x W^T + bias in the form in which the matrix is kept."""
    if weight.form is DenseForm.BORROWED:
        return linear(x_TK, weight.weight, weight.bias)
    return panel_linear(x_TK, weight.weight, weight.bias, weight.form is DenseForm.ROUNDED)


def rounded_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """x W^T as training multiplies in bf16: both sides of its three products are rounded, sums fp32."""
    product: Tensor = _Rounded.apply(x_TK, weight_NK)  # type: ignore[no-untyped-call]
    return product


class _Rounded(Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        x, weight = x_TK.bfloat16().float(), weight_NK.bfloat16().float()
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        by_y = gradients[0].bfloat16().float()
        return by_y @ weight, by_y.T @ x
