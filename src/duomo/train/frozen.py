"""A 2-bit base to train over: packed codes untouched, gradients flowing through them to the inputs.

Forward is the very product that serves (int8 activations, `kernels.packed_linear`), so an adapter learns
against what it will meet. Backward is the gradient of the plain product with the decoded weight; rounding
the activations counts as the identity. A decoded matrix lives for one product, or in a bounded memory.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.kernels.weights import PackedWeight, TrellisWeight
from duomo.model.ernie import Ernie
from duomo.model.experts import Router
from duomo.model.packed import unfuse
from duomo.model.packed_layers import PackedEmbedding, PackedExperts, PackedLinear
from duomo.train.banks import run_experts

DECODED_BYTES = 512 << 20  # decoded matrices kept between steps, the least recently used going first
_decoded: OrderedDict[tuple[int, int], tuple[PackedWeight, Tensor]] = OrderedDict()


def decode(weight: PackedWeight, index: int = 0) -> Tensor:
    """fp32 [N, K] of one matrix in the original basis.

    Made by the kernel itself, from the identity: rotated, a unit vector is +-block**-0.5 in one block, which
    int8 holds exactly, so the product is the stored matrix up to fp32 rounding and takes no Python loop.
    """
    key = (id(weight), index)
    if key in _decoded:
        _decoded.move_to_end(key)
        return _decoded[key][1]
    with torch.no_grad():
        matrix = kernels.packed_linear(torch.eye(weight.columns), weight, index).T.contiguous()
    _decoded[key] = (weight, matrix)
    while sum(kept.nbytes for _, kept in _decoded.values()) > DECODED_BYTES and len(_decoded) > 1:
        _decoded.popitem(last=False)
    return matrix


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, index: int) -> Tensor:
        ctx.weight, ctx.index = weight, index
        return kernels.packed_linear(x, weight, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ decode(ctx.weight, ctx.index).to(grad.dtype), None, None


def product(x: Tensor, weight: PackedWeight, index: int = 0) -> Tensor:
    """x W^T [..., N] of a packed matrix, differentiable in x."""
    return _Product.apply(x, weight, index)  # type: ignore[no-untyped-call, no-any-return]


class FrozenLinear(nn.Module):
    """`PackedLinear` with a gradient for its inputs."""

    def __init__(self, base: PackedLinear) -> None:
        super().__init__()
        self.packed, self.bias = base.packed, base.bias
        self.shape = (base.packed.rows, base.packed.columns)

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, self.packed)
        return y if self.bias is None else y + self.bias


class FrozenEmbedding(nn.Module):
    """Rows of int8 looked up; as a head, a gradient for its inputs."""

    def __init__(self, base: PackedEmbedding) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.base(ids_T)  # type: ignore[no-any-return]

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        return product(hidden_TD, self.base.packed)


class FrozenBank(nn.Module):
    """`PackedExperts` whose inputs and routing weights have gradients; the router is fp32 as ever."""

    def __init__(self, base: PackedExperts) -> None:
        super().__init__()
        self.router: Router = base.router
        self.gate_up: TrellisWeight = base.gate_up
        self.down: TrellisWeight = base.down

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, width, inner size: those of `down`."""
        return self.down.num_matrices, self.down.rows, self.down.columns

    def expert_gate_up(self, x: Tensor, expert: int) -> Tensor:
        return product(x, self.gate_up, expert)

    def expert_down(self, inner: Tensor, expert: int) -> Tensor:
        return product(inner, self.down, expert)

    def forward(
        self,
        hidden_TD: Tensor,
        chosen_TK: Tensor | None = None,
        rows: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        return run_experts(self, hidden_TD, chosen_TK, rows, kept)


def open_packed(model: nn.Module) -> int:
    """Puts the differentiable twins where packed modules stand; returns how many there were."""
    twins: dict[type[nn.Module], type[nn.Module]] = {
        PackedLinear: FrozenLinear,
        PackedEmbedding: FrozenEmbedding,
        PackedExperts: FrozenBank,
    }
    if isinstance(model, Ernie):
        unfuse(model)
    found = [(name, module) for name, module in model.named_modules() if type(module) in twins]
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, twins[type(module)](module))
    return len(found)
