"""Low-rank additions in service: y = base(x) + B A x, beside a base that stays as it is, plain or packed.

`adapted` makes the modules of one adapter; each shares its base with the plain model and takes the base's
place for a pass (`engine.adapters`). Where a packed module is one fused call, its adapted twin takes the call
apart, since the addition belongs between its products. No gradients: training has modules of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.model.ernie import Ernie
from duomo.model.experts import ExpertBank, note_choice
from duomo.model.inputs import Batch, KVCache
from duomo.model.layers import Linear
from duomo.model.packed_layers import PackedAttention, PackedExperts, PackedLinear, PackedMLP
from duomo.model.rope import Rotation


class LowRank(NamedTuple):
    """A [r, in] and B [out, r]; B carries the adapter's scale."""

    a: Tensor
    b: Tensor

    def added(self, x: Tensor) -> Tensor:
        return kernels.linear(kernels.linear(x, self.a), self.b)

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.a.to(dtype), self.b.to(dtype))


@dataclass(slots=True)
class Adapter:
    """`linears` by our module's name; `experts` by bank, then expert, then gate, up or down."""

    linears: dict[str, LowRank] = field(default_factory=dict)
    experts: dict[str, dict[int, dict[str, LowRank]]] = field(default_factory=dict)

    @property
    def touches_vision(self) -> bool:
        """Features of pictures depend on it."""
        return any(name.startswith(("vision_tower.", "resampler.")) for name in self.linears)


def adapted(model: Ernie, adapter: Adapter) -> dict[str, nn.Module]:
    """The modules that stand in for the model's own, by name. The adapter's names must be the model's."""
    found: dict[str, nn.Module] = {}
    fused: dict[str, dict[str, LowRank]] = {}
    modules = dict(model.named_modules())
    for name, low in adapter.linears.items():
        parent, _, leaf = name.rpartition(".")
        if name in modules:
            found[name] = AdaptedLinear(modules[name], low)
        else:  # inside a fused module
            fused.setdefault(parent, {})[leaf] = low
    for name, lows in fused.items():
        base = modules[name]
        if isinstance(base, PackedAttention):
            found[name] = AdaptedAttention(base, lows)
        else:
            assert isinstance(base, PackedMLP), f"{name} takes no adapter"
            found[name] = AdaptedMLP(base, lows)
    for name, experts in adapter.experts.items():
        bank = modules[name]
        assert isinstance(bank, (ExpertBank, PackedExperts)), f"{name} is no bank"
        found[name] = AdaptedBank(bank, experts)
    return found


class AdaptedLinear(nn.Module):
    def __init__(self, base: nn.Module, low: LowRank) -> None:
        super().__init__()
        assert isinstance(base, (Linear, PackedLinear)), f"{type(base).__name__} takes no adapter"
        self.base, self.low = base, low

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low.added(x)  # type: ignore[no-any-return]


class AdaptedAttention(nn.Module):
    """`PackedAttention` with additions to any of q, k, v and o."""

    def __init__(self, base: PackedAttention, lows: Mapping[str, LowRank]) -> None:
        super().__init__()
        self.base, self.lows = base, lows

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation, layer_index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        heads = (-1, 2 * rotation[0].shape[-1])
        weights = zip("qkv", self.base.weights, strict=True)
        query, key, value = (
            _with(kernels.packed_linear(hidden_TD, weight), hidden_TD, self.lows.get(letter)).unflatten(
                -1, heads
            )
            for letter, weight in weights
        )
        query, key = kernels.rotate_pairs(query, *rotation), kernels.rotate_pairs(key, *rotation)
        out_TX = cache.attend(layer_index, query, key, value, batch).flatten(-2)
        return _with(kernels.packed_linear(out_TX, self.base.out), out_TX, self.lows.get("o"))


class AdaptedMLP(nn.Module):
    """`PackedMLP` with additions to any of gate, up and down."""

    def __init__(self, base: PackedMLP, lows: Mapping[str, LowRank]) -> None:
        super().__init__()
        self.base, self.lows = base, lows

    def forward(
        self, hidden_TD: Tensor, batch: Batch | None = None, chosen_TK: Tensor | None = None
    ) -> Tensor:
        gate_weight, up_weight, down_weight = self.base.weights
        gate = _with(kernels.packed_linear(hidden_TD, gate_weight), hidden_TD, self.lows.get("gate"))
        up = _with(kernels.packed_linear(hidden_TD, up_weight), hidden_TD, self.lows.get("up"))
        inner = nn.functional.silu(gate) * up
        return _with(kernels.packed_linear(inner, down_weight), inner, self.lows.get("down"))


class AdaptedBank(nn.Module):
    """A bank whose experts have additions of their own; the router is the base's.

    The sum is that of `kernels.reference.experts`: a token's K terms in the order of its choice.
    """

    def __init__(
        self, base: ExpertBank | PackedExperts, experts: Mapping[int, Mapping[str, LowRank]]
    ) -> None:
        super().__init__()
        self.base, self.experts = base, experts

    def forward(
        self, hidden_TD: Tensor, chosen_TK: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        routing = self._route(hidden_TD)
        note_choice(routing.expert_ids_TK, chosen_TK, rows)
        num_tokens, num_chosen = routing.expert_ids_TK.shape
        pairs = routing.expert_ids_TK.flatten()
        order = pairs.argsort(stable=True)
        chosen, counts = pairs[order].unique_consecutive(return_counts=True)
        inputs = hidden_TD[order // num_chosen].split(counts.tolist())
        outputs = [self._expert(int(expert), x) for expert, x in zip(chosen, inputs, strict=True)]
        if not outputs:
            return torch.zeros_like(hidden_TD)
        place_of_pair = torch.empty_like(order)
        place_of_pair[order] = torch.arange(order.numel())
        pairs_TKD: Tensor = torch.cat(outputs)[place_of_pair].unflatten(0, (num_tokens, num_chosen))
        return (pairs_TKD * routing.weights_TK[..., None]).sum(1)

    def _route(self, hidden_TD: Tensor) -> kernels.Routing:
        base, router = self.base, self.base.router
        if isinstance(base, ExpertBank):
            return router(hidden_TD)  # type: ignore[no-any-return]
        routing = kernels.packed_route(
            hidden_TD, router.weight, router.bias, router.num_chosen, router.norm_min
        )
        if base.listener is not None:
            base.listener(routing.expert_ids_TK)
        return routing

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        lows = self.experts.get(expert, {})
        gate, up = self._product(x, "gate_up", expert).chunk(2, dim=-1)
        inner = nn.functional.silu(_with(gate, x, lows.get("gate"))) * _with(up, x, lows.get("up"))
        return _with(self._product(inner, "down", expert), inner, lows.get("down"))

    def _product(self, x: Tensor, which: str, expert: int) -> Tensor:
        weight = getattr(self.base, which)
        if isinstance(self.base, ExpertBank):
            return kernels.linear(x, weight[expert])
        return kernels.packed_linear(x, weight, expert)


def _with(y: Tensor, x: Tensor, low: LowRank | None) -> Tensor:
    return y if low is None else y + low.added(x)
