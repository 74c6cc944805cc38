"""Products in bfloat16 under fp32 weights: what makes a training step on a CPU with AVX-512 BF16 fast.

Only matrix products change their type; the residual stream, norms, attention, routers and losses stay fp32.
`torch.autocast` does the same for everything and is slower than fp32 here, for two reasons (measured, torch
2.13, Zen 4): oneDNN compiles a product for every new number of rows, and experts see another number at every
step; and the backward pass of bf16 attention is slow. So rows are filled up to multiples of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROW_BLOCK = 64
MIN_OUTPUTS = 64  # smaller matrices are routers, whose choice is fp32's


def fast_products(wanted: bool, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where it pays: these products on such a CPU, autocast on a GPU, fp32 elsewhere."""
    if not wanted:
        return nullcontext()
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    has_bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and _multiplies_bf16()
    return Bf16Products() if has_bf16 else nullcontext()


def _multiplies_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


class Bf16Products(TorchFunctionMode):
    """Inside this context every `F.linear` with gradients multiplies in bfloat16, into its input's type."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and torch.is_grad_enabled() and not kwargs and _is_wide(args[1]):
            bias = args[2] if len(args) > 2 else None
            product = _Product.apply(args[0], args[1])  # type: ignore[no-untyped-call]
            return product if bias is None else product + bias
        return func(*args, **(kwargs or {}))


def _is_wide(weight_NK: Tensor) -> bool:
    return weight_NK.ndim == 2 and weight_NK.shape[0] >= MIN_OUTPUTS


class _Product(torch.autograd.Function):
    """x [T, K] times W' [K, N], and both gradients, each one bf16 product, in the type of what it is for."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor) -> Tensor:
        x, weight = _rows(x_TK), weight_NK.bfloat16()
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.types = x_TK.shape, (x_TK.dtype, weight_NK.dtype)
        product: Tensor = (x @ weight.T)[: _count(x_TK)].to(x_TK.dtype)
        return product.reshape(*x_TK.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = _rows(gradients[0])
        wants_x, wants_weight = ctx.needs_input_grad
        type_x, type_weight = ctx.types
        count = _count(gradients[0])
        by_x = (gradient @ weight)[:count].to(type_x).reshape(ctx.shape) if wants_x else None
        return by_x, (gradient.T @ x).to(type_weight) if wants_weight else None


def _count(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _rows(x: Tensor) -> Tensor:
    """bf16 rows, filled up with zeros to a multiple of ROW_BLOCK."""
    count = _count(x)
    rows = torch.empty(count + -count % ROW_BLOCK, x.shape[-1], dtype=torch.bfloat16, device=x.device)
    rows[:count] = x.reshape(count, -1)
    rows[count:] = 0
    return rows
