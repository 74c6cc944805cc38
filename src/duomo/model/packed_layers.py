"""Modules over packed weights, called like `Linear`, `Embedding`, `ExpertBank`, `MLP`, `Attention`.

Each is one native call where there are native kernels. Packed weights are no parameters: `state_dict` shows
only what stayed plain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.kernels.weights import IntWeight, PackedWeight, TrellisWeight
from duomo.model.experts import Router, note_choice
from duomo.model.inputs import Batch, KVCache
from duomo.model.layers import RMSNorm
from duomo.model.rope import Rotation


class PackedLinear(nn.Module):
    """y = x W^T + b, by int8 activations."""

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.packed = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = kernels.packed_linear(x, self.packed)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """Rows of integers, rotated: looked up and turned back, or the head. Rows come out in `dtype`."""

    def __init__(self, weight: IntWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = weight
        self.dtype = dtype

    def forward(self, ids_T: Tensor) -> Tensor:
        return kernels.packed_rows(ids_T, self.packed).to(self.dtype)

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        return kernels.packed_linear(hidden_TD, self.packed)


class PackedExperts(nn.Module):
    """A bank whose experts stay packed; the router is fp32 as ever."""

    def __init__(self, router: Router, gate_up: TrellisWeight, down: TrellisWeight) -> None:
        super().__init__()
        self.router = router
        self.gate_up = gate_up
        self.down = down
        self.listener: Callable[[Tensor], None] | None = None  # hears the chosen ids [T, K]

    def forward(
        self, hidden_TD: Tensor, chosen_TK: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        routing = self.route(hidden_TD)
        if self.listener is not None:
            self.listener(routing.expert_ids_TK)
        note_choice(routing.expert_ids_TK, chosen_TK, rows)
        chosen = (routing.expert_ids_TK, routing.weights_TK)
        return kernels.packed_experts(hidden_TD, *chosen, self.gate_up, self.down)

    def route(self, hidden_TD: Tensor) -> kernels.Routing:
        """What the router says alone; nobody hears of it."""
        router = self.router
        return kernels.packed_route(hidden_TD, router.weight, router.bias, router.num_chosen, router.norm_min)


class PackedMLP(nn.Module):
    """Dense layers and shared experts: one native call. `plain` is the module it stands for."""

    def __init__(self, plain: nn.Module, gate: TrellisWeight, up: TrellisWeight, down: TrellisWeight) -> None:
        super().__init__()
        self.plain = (plain,)  # in a tuple, which torch does not count among the submodules
        self.weights = (gate, up, down)

    def forward(
        self, hidden_TD: Tensor, batch: Batch | None = None, chosen_TK: Tensor | None = None
    ) -> Tensor:
        return kernels.packed_mlp(hidden_TD, *self.weights)


class PackedAttention(nn.Module):
    """Queries, keys and values by one native call, rotated positions included. `plain` as in `PackedMLP`."""

    def __init__(
        self, plain: nn.Module, q: TrellisWeight, k: TrellisWeight, v: TrellisWeight, o: TrellisWeight
    ) -> None:
        super().__init__()
        self.plain = (plain,)
        self.weights = (q, k, v)
        self.out = o

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation, layer_index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        query, key, value = kernels.packed_qkv(hidden_TD, *self.weights, *rotation)
        out_TNH = cache.attend(layer_index, query, key, value, batch)
        return kernels.packed_linear(out_TNH.flatten(-2), self.out)


class PackedNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.plain = (norm,)
        self.weight = norm.weight
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.packed_rmsnorm(x, self.weight, self.eps)
