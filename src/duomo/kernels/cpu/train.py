"""The model's operations where gradients are wanted: csrc/train.hpp behind torch's autograd.

Each takes what its twin in `kernels.reference` takes and gives its result and gradients up to rounding; a
gradient that nobody asked for is not computed. `rounded_products` says whether products round both sides to
bf16, which a product remembers for its gradients. Threads are torch's number, not the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from duomo.kernels.reference import Routing

_is_rounded: ContextVar[bool] = ContextVar("is_rounded", default=False)
_PLAIN = (Tensor, nn.Parameter)  # not shards of several processes
HEAD_MULTIPLE = 16


def is_there() -> bool:
    """AVX-512 with BF16, which DUOMO_CPU_ISA has not capped."""
    from duomo import _native

    return _native.train.is_there()


@contextmanager
def rounded_products() -> Iterator[None]:
    """Products in here multiply bf16 by bf16 and add in fp32, forward and backward."""
    token = _is_rounded.set(True)
    try:
        yield
    finally:
        _is_rounded.reset(token)


def takes(*tensors: Tensor) -> bool:
    """fp32 on the CPU, with a gradient for at least one; within `rounded_products` frozen ones, too."""
    return (
        torch.is_grad_enabled()
        and (_is_rounded.get() or any(x.requires_grad for x in tensors))
        and all(type(x) in _PLAIN and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    )


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x[..., K] W^T + bias."""
    assert x.shape[-1] == weight_NK.shape[1], f"rows {list(x.shape)} for a matrix {list(weight_NK.shape)}"
    product: Tensor = _Linear.apply(x, weight_NK)  # type: ignore[no-untyped-call]
    return product if bias_N is None else product + bias_N


def experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """All experts of a bank in one product forward and two backward, for each of its two matrices."""
    num_experts, size, width = gate_up_EFD.shape
    assert down_EDF.shape == (num_experts, width, size // 2) and hidden_TD.shape[1] == width, "no such bank"
    assert weights_TK.shape == expert_ids_TK.shape and len(hidden_TD) == len(weights_TK)
    out: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weights_TK, gate_up_EFD, down_EDF, expert_ids_TK
    )
    return out


def attention_within(
    query_TNH: Tensor,
    key_TGH: Tensor,
    value_TGH: Tensor,
    lengths: Sequence[int],
    is_causal: bool = True,
    blocks_T: Tensor | None = None,
) -> Tensor:
    """Every sequence within itself."""
    assert blocks_T is None or (blocks_T.dtype == torch.int32 and len(blocks_T) == len(query_TNH))
    assert sum(lengths) == len(query_TNH) and key_TGH.shape == value_TGH.shape
    assert query_TNH.shape[::2] == key_TGH.shape[::2], "queries and keys of one width and number"
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query_TNH, key_TGH, value_TGH, lengths, is_causal, blocks_T
    )
    return out


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    assert weight.shape == x.shape[-1:], "one weight a column"
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rotate_pairs(x_TNH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    assert cos_TP.shape == sin_TP.shape == (len(x_TNH), x_TNH.shape[-1] // 2), "one angle a pair"
    out: Tensor = _Rotation.apply(x_TNH, cos_TP, sin_TP)  # type: ignore[no-untyped-call]
    return out


def route(
    hidden_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_chosen: int, norm_min: float = 1e-12
) -> Routing:
    """Never rounded; of experts with equal probabilities the first."""
    assert len(router_ED) == len(bias_E) >= num_chosen and hidden_TD.shape[1] == router_ED.shape[1]
    ids, weights, logits = _Route.apply(  # type: ignore[no-untyped-call]
        hidden_TD, router_ED, bias_E.detach(), num_chosen, norm_min
    )
    return Routing(ids, weights, logits)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    assert gate.shape == up.shape
    out: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[T]; a label below zero costs nothing."""
    loss: Tensor = _CrossEntropy.apply(logits_TV, labels_T)  # type: ignore[no-untyped-call]
    return loss


class _Bank:
    """Products of rows sorted by matrix with a bank [E, N, K], of which a plain matrix is one."""

    def __init__(
        self, weight: Tensor, ends_E: Tensor, rows: Tensor | None = None, is_rounded: bool | None = None
    ) -> None:
        self.weight = weight.contiguous()
        self.ends, self.rows = ends_E, rows
        self.outputs, self.inputs = weight.shape[-2:]
        self.is_rounded = _is_rounded.get() if is_rounded is None else is_rounded

    def _call(self) -> tuple[int, int, int, int]:
        return self.ends.data_ptr(), self.ends.numel(), self.outputs, self.inputs

    def _how(self) -> tuple[bool, int]:
        return self.is_rounded, torch.get_num_threads()

    def _rows_address(self) -> int:
        return 0 if self.rows is None else self.rows.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        count = len(x) if self.rows is None else len(self.rows)
        y = x.new_empty(count, self.outputs)
        addresses = self._rows_address(), x.data_ptr(), self.weight.data_ptr(), y.data_ptr()
        _train().product(*self._call(), *addresses, *self._how())
        return y

    def by_input(self, by_y: Tensor) -> Tensor:
        """Of the rows as they are sorted."""
        by_x = by_y.new_empty(len(by_y), self.inputs)
        addresses = self.weight.data_ptr(), by_y.data_ptr(), by_x.data_ptr()
        _train().product_by_input(*self._call(), *addresses, *self._how())
        return by_x

    def by_weight(self, x: Tensor, by_y: Tensor) -> Tensor:
        by_weight = torch.empty_like(self.weight)
        addresses = self._rows_address(), x.data_ptr(), by_y.data_ptr(), by_weight.data_ptr()
        _train().product_by_weight(*self._call(), *addresses, *self._how())
        return by_weight


def _train() -> Any:
    from duomo import _native

    return _native.train


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1]).contiguous()
        bank = _Bank(weight_NK, torch.tensor([len(rows)]))
        ctx.save_for_backward(rows, weight_NK)
        ctx.bank, ctx.shape = bank, x.shape
        return bank.forward(rows).reshape(*x.shape[:-1], bank.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, _ = ctx.saved_tensors
        by_rows = by_y.reshape(len(rows), ctx.bank.outputs).contiguous()
        wants_x, wants_weight = ctx.needs_input_grad
        by_x = ctx.bank.by_input(by_rows).reshape(ctx.shape) if wants_x else None
        return by_x, ctx.bank.by_weight(rows, by_rows) if wants_weight else None


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        gate_up_EFD: Tensor,
        down_EDF: Tensor,
        expert_ids_TK: Tensor,
    ) -> Tensor:
        hidden, weights = hidden_TD.contiguous(), weights_TK.contiguous()
        num_chosen = expert_ids_TK.shape[1]
        # numpy: a sort of small integers, and counts, for a tenth of what the same calls of torch cost
        pairs = expert_ids_TK.numpy().ravel()
        order = np.argsort(pairs.astype(np.int16), kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ends = torch.from_numpy(np.bincount(pairs, minlength=len(down_EDF)).cumsum())
        assert len(ends) == len(down_EDF), "an expert's number is not in the bank"
        first = _Bank(gate_up_EFD, ends, torch.from_numpy(order // num_chosen))
        second = _Bank(down_EDF, ends)
        gate_up = first.forward(hidden)
        inner = _swiglu(gate_up)
        pairs_XD = second.forward(inner)
        ctx.banks, ctx.place = (first, second), torch.from_numpy(place)
        ctx.save_for_backward(hidden, weights, gate_up_EFD, down_EDF, gate_up, inner, pairs_XD)
        return _combine(pairs_XD, ctx.place, weights, hidden.shape, num_chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights, _, _, gate_up, inner, pairs_XD = ctx.saved_tensors
        first, second = ctx.banks
        wants_hidden, _, wants_first, wants_second, _ = ctx.needs_input_grad
        by_out = by_out.contiguous()
        by_pairs, by_weights = torch.empty_like(pairs_XD), torch.empty_like(weights)
        _train().combine_backward(
            pairs_XD.data_ptr(), ctx.place.data_ptr(), weights.data_ptr(), by_out.data_ptr(),
            *weights.shape, hidden.shape[1], by_pairs.data_ptr(), by_weights.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        by_down = second.by_weight(inner, by_pairs) if wants_second else None
        if not (wants_hidden or wants_first):
            return None, by_weights, None, by_down, None
        by_inner = second.by_input(by_pairs)
        by_gate_up = _swiglu_backward(gate_up, by_inner)
        by_first = first.by_weight(hidden, by_gate_up) if wants_first else None
        by_hidden = None
        if wants_hidden:
            by_rows = first.by_input(by_gate_up)
            by_hidden = _combine(by_rows, ctx.place, None, hidden.shape, weights.shape[1])
        return by_hidden, by_weights, by_first, by_down, None


def _swiglu(gate_up_X2F: Tensor) -> Tensor:
    count, width = gate_up_X2F.shape[0], gate_up_X2F.shape[1] // 2
    out = gate_up_X2F.new_empty(count, width)
    gate = gate_up_X2F.data_ptr()
    _train().swiglu(gate, gate + 4 * width, 2 * width, count, width, out.data_ptr(), torch.get_num_threads())
    return out


def _swiglu_backward(gate_up_X2F: Tensor, by_y: Tensor) -> Tensor:
    count, width = by_y.shape
    out = torch.empty_like(gate_up_X2F)
    gate, by_gate = gate_up_X2F.data_ptr(), out.data_ptr()
    up, by_up = gate + 4 * width, by_gate + 4 * width
    _train().swiglu_backward(
        gate, up, 2 * width, by_y.data_ptr(), count, width, by_gate, by_up, torch.get_num_threads()
    )
    return out


def _combine(
    rows: Tensor, place: Tensor, weights: Tensor | None, shape: Sequence[int], num_chosen: int
) -> Tensor:
    out = rows.new_empty(*shape)
    _train().combine(
        rows.data_ptr(), place.data_ptr(), 0 if weights is None else weights.data_ptr(),
        shape[0], num_chosen, shape[1], out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_TNH: Tensor,
        key_TGH: Tensor,
        value_TGH: Tensor,
        lengths: Sequence[int],
        is_causal: bool,
        blocks_T: Tensor | None,
    ) -> Tensor:
        query, key, value = query_TNH.contiguous(), key_TGH.contiguous(), value_TGH.contiguous()
        tokens, heads, dim = query.shape
        ctx.shape = np.asarray(lengths, dtype=np.int64), heads, key.shape[1], dim, is_causal
        ctx.blocks = None if blocks_T is None else blocks_T.contiguous()
        out, lse = torch.empty_like(query), query.new_empty(tokens, heads)
        ctx.save_for_backward(query, key, value, out, lse)
        addresses = [x.data_ptr() for x in (query, key, value, out, lse)]
        _train().attention(*ctx.shape, _address(ctx.blocks), *addresses, torch.get_num_threads())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        by = [torch.empty_like(x) for x in saved[:3]]
        given = (*saved, by_out.contiguous(), *by)
        addresses = [x.data_ptr() for x in given]
        _train().attention_backward(*ctx.shape, _address(ctx.blocks), *addresses, torch.get_num_threads())
        return *by, None, None, None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.size = x.numel() // x.shape[-1], x.shape[-1]
        _train().rmsnorm(
            x.data_ptr(), weight.data_ptr(), eps, *ctx.size, y.data_ptr(), torch.get_num_threads()
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_y, by_x, by_weight = by_y.contiguous(), torch.empty_like(x), torch.empty_like(weight)
        _train().rmsnorm_backward(
            x.data_ptr(), weight.data_ptr(), ctx.eps, by_y.data_ptr(), *ctx.size,
            by_x.data_ptr(), by_weight.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return by_x, by_weight, None


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        ctx.angles = cos_TP.contiguous(), sin_TP.contiguous()
        return _turned(x_TNH, ctx.angles, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(by_y, ctx.angles, -1.0), None, None


def _turned(x_TNH: Tensor, angles: tuple[Tensor, Tensor], sign: float) -> Tensor:
    x = x_TNH.contiguous()
    y = torch.empty_like(x)
    cos, sin = (angle.data_ptr() for angle in angles)
    _train().rotate(x.data_ptr(), cos, sin, sign, *x.shape, y.data_ptr(), torch.get_num_threads())
    return y


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y, width = torch.empty_like(gate), gate.shape[-1]
        ctx.save_for_backward(gate, up)
        ctx.size = gate.numel() // width, width
        addresses = gate.data_ptr(), up.data_ptr(), width
        _train().swiglu(*addresses, *ctx.size, y.data_ptr(), torch.get_num_threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_y: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        by_y, by_gate, by_up = by_y.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        addresses = gate.data_ptr(), up.data_ptr(), gate.shape[-1], by_y.data_ptr()
        by = by_gate.data_ptr(), by_up.data_ptr()
        _train().swiglu_backward(*addresses, *ctx.size, *by, torch.get_num_threads())
        return by_gate, by_up


class _Route(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_chosen: int, norm_min: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, bias = hidden_TD.contiguous(), bias_E.contiguous()
        ctx.bank = _Bank(router_ED, torch.tensor([len(hidden)]), is_rounded=False)
        logits = ctx.bank.forward(hidden)
        p, weights = torch.empty_like(logits), logits.new_empty(len(hidden), num_chosen)
        ids = torch.empty_like(weights, dtype=torch.int64)
        ctx.size = norm_min, *logits.shape, num_chosen
        addresses = p.data_ptr(), ids.data_ptr(), weights.data_ptr()
        _train().route(logits.data_ptr(), bias.data_ptr(), *ctx.size, *addresses, torch.get_num_threads())
        ctx.save_for_backward(hidden, router_ED, p, ids, weights)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return ids, weights, logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: None, by_weights: Tensor | None, by_logits: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, _, p, ids, weights = ctx.saved_tensors
        if by_weights is not None:
            by_weights, by_choice = by_weights.contiguous(), torch.empty_like(p)
            addresses = [x.data_ptr() for x in (p, ids, weights, by_weights)]
            _train().route_backward(*addresses, *ctx.size, by_choice.data_ptr(), torch.get_num_threads())
            by_logits = by_choice if by_logits is None else by_choice + by_logits
        if by_logits is None:
            return None, None, None, None, None
        by_logits = by_logits.contiguous()
        wants_hidden, wants_router, *_ = ctx.needs_input_grad
        by_hidden = ctx.bank.by_input(by_logits) if wants_hidden else None
        return by_hidden, ctx.bank.by_weight(hidden, by_logits) if wants_router else None, None, None, None


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        logits, labels = logits_TV.contiguous(), labels_T.contiguous()
        assert labels.numel() == 0 or int(labels.max()) < logits.shape[1], "a label outside the vocabulary"
        loss, lse = logits.new_empty(len(logits)), logits.new_empty(len(logits))
        ctx.save_for_backward(logits, labels, lse)
        addresses = loss.data_ptr(), lse.data_ptr()
        given = logits.data_ptr(), labels.data_ptr()
        _train().cross_entropy(*given, *logits.shape, *addresses, torch.get_num_threads())
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None]:
        logits, labels, lse = ctx.saved_tensors
        by_loss, by_logits = by_loss.contiguous(), torch.empty_like(logits)
        addresses = logits.data_ptr(), labels.data_ptr(), lse.data_ptr(), by_loss.data_ptr()
        _train().cross_entropy_backward(
            *addresses, *logits.shape, by_logits.data_ptr(), torch.get_num_threads()
        )
        return by_logits, None
