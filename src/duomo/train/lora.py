"""Low-rank adapters on linear layers and on every expert of a bank by itself.

`attach` wraps what a plan names and freezes the rest; the base keeps its tensors to the bit. An expert's
adapter sees only the tokens routed to it. Factors A start random and B zero, so an attached adapter changes
nothing until it has been trained. `merge` folds it into the weights and unwraps.

Where matrices are small, training computes with the folded weight W + scale * B A, made anew at every pass:
one product and its gradients cost less there than two thin ones beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duomo import kernels
from duomo.errors import TrainingError
from duomo.model.experts import ExpertBank, Router
from duomo.model.layers import Linear
from duomo.train.banks import run_experts
from duomo.train.frozen import FrozenBank, FrozenLinear
from duomo.train.groups import group_of

B = TypeVar("B", bound=nn.Module)
FOLDS_UP_TO = 512  # the smaller side of a matrix
LINEAR_GROUPS = ("attention", "dense", "shared", "resampler", "vision_tower")
BANK_GROUPS = ("text_experts", "vision_experts")


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """`ranks` by group of `train.groups`; the added weight is `scale` * B A."""

    ranks: Mapping[str, int] = field(default_factory=lambda: LoraPlan.usual(8))
    scale: float = 2.0

    @staticmethod
    def usual(rank: int) -> dict[str, int]:
        """Attention and shared at `rank`, each expert at a sixteenth: there are many of them."""
        expert = max(1, rank // 16)
        return {"attention": rank, "shared": rank, "text_experts": expert, "vision_experts": expert}


def _start(*shape: int, generator: torch.Generator) -> nn.Parameter:
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)


class LoraLinear(nn.Module):
    """base(x) + scale * B A x; A is [r, in], B is [out, r]."""

    def __init__(
        self, base: Linear | FrozenLinear, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        out_size, in_size = base.shape if isinstance(base, FrozenLinear) else base.weight.shape
        self.base, self.scale = base, scale
        self.a = _start(rank, in_size, generator=generator)
        self.b = nn.Parameter(torch.zeros(out_size, rank))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, Linear) and _folds(x, self.base.weight):
            weight = torch.addmm(self.base.weight, self.b, self.a, alpha=self.scale)
            return kernels.linear(x, weight, self.base.bias)
        added = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return self.base(x) + self.scale * added  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> Linear:
        base = _plain(self.base, Linear)
        base.weight.add_((self.b @ self.a).to(base.weight.dtype), alpha=self.scale)
        return base


class LoraBank(nn.Module):
    """A bank whose experts each have factors of their own for gate, up and down; the router is the base's."""

    def __init__(
        self, base: ExpertBank | FrozenBank, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        num, width, size = base.shape if isinstance(base, FrozenBank) else base.down.shape
        self.base, self.scale = base, scale
        self.gate_a = _start(num, rank, width, generator=generator)
        self.gate_b = nn.Parameter(torch.zeros(num, size, rank))
        self.up_a = _start(num, rank, width, generator=generator)
        self.up_b = nn.Parameter(torch.zeros(num, size, rank))
        self.down_a = _start(num, rank, size, generator=generator)
        self.down_b = nn.Parameter(torch.zeros(num, width, rank))

    @property
    def router(self) -> Router:
        return self.base.router

    def forward(
        self,
        hidden_TD: Tensor,
        chosen_TK: Tensor | None = None,
        rows: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        if isinstance(self.base, ExpertBank) and _folds(hidden_TD, self.base.down):
            banks = self.base.gate_up + self._gate_up_added(), self.base.down + self._down_added()
            return self.base.run_with(*banks, hidden_TD, chosen_TK, rows, kept)
        return run_experts(self, hidden_TD, chosen_TK, rows, kept)

    def _gate_up_added(self) -> Tensor:
        return self.scale * torch.cat((self.gate_b @ self.gate_a, self.up_b @ self.up_a), dim=1)

    def _down_added(self) -> Tensor:
        return self.scale * (self.down_b @ self.down_a)

    def expert_gate_up(self, x: Tensor, expert: int) -> Tensor:
        gate = self._added(x, self.gate_a[expert], self.gate_b[expert])
        added = torch.cat((gate, self._added(x, self.up_a[expert], self.up_b[expert])), dim=-1)
        if isinstance(self.base, FrozenBank):
            return self.base.expert_gate_up(x, expert) + added
        return kernels.linear(x, self.base.gate_up[expert]) + added

    def expert_down(self, inner: Tensor, expert: int) -> Tensor:
        added = self._added(inner, self.down_a[expert], self.down_b[expert])
        if isinstance(self.base, FrozenBank):
            return self.base.expert_down(inner, expert) + added
        return kernels.linear(inner, self.base.down[expert]) + added

    def _added(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> ExpertBank:
        base = _plain(self.base, ExpertBank)
        base.gate_up.add_(self._gate_up_added().to(base.gate_up.dtype))
        base.down.add_(self._down_added().to(base.down.dtype))
        return base


def _folds(x: Tensor, weight: Tensor) -> bool:
    is_wide = x.dtype == weight.dtype == torch.float32
    return is_wide and torch.is_grad_enabled() and min(weight.shape[-2:]) <= FOLDS_UP_TO


def _plain(base: nn.Module, kind: type[B]) -> B:
    if not isinstance(base, kind):
        raise TrainingError("a packed base cannot take an adapter in; `duomo merge` writes a plain one")
    return base


Adapter: TypeAlias = LoraLinear | LoraBank


def attach(model: nn.Module, plan: LoraPlan, seed: int = 0) -> dict[str, Adapter]:
    """Wraps what the plan names and freezes all else. TrainingError for a group that matches nothing."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Adapter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (Linear, FrozenLinear)):
            rank = plan.ranks.get(group_of(f"{name}.weight"), 0)
            if rank:
                found[name] = LoraLinear(module, rank, plan.scale, generator)
        elif isinstance(module, (ExpertBank, FrozenBank)):
            rank = plan.ranks.get(group_of(f"{name}.down"), 0)
            if rank:
                found[name] = LoraBank(module, rank, plan.scale, generator)
    _check(plan, found)
    model.requires_grad_(False)
    for name, adapter in found.items():
        _replace(model, name, adapter)
        for key, parameter in adapter.named_parameters():
            parameter.requires_grad_(not key.startswith("base."))
    return found


def merge(model: nn.Module) -> None:
    """Folds every adapter into its base and takes the wrappers away."""
    for name, adapter in adapters_of(model).items():
        _replace(model, name, adapter.merged())


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Attached adapters by the name of what they wrap."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LoraLinear, LoraBank))}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    holder = model.get_submodule(parent)
    if last.isdigit() and isinstance(holder, nn.ModuleList):
        holder[int(last)] = module
    else:
        setattr(holder, last, module)


def _check(plan: LoraPlan, found: Mapping[str, Adapter]) -> None:
    present = {
        group_of(f"{n}.weight" if isinstance(a, LoraLinear) else f"{n}.down") for n, a in found.items()
    }
    for group, rank in plan.ranks.items():
        if group not in LINEAR_GROUPS + BANK_GROUPS:
            allowed = ", ".join(LINEAR_GROUPS + BANK_GROUPS)
            raise TrainingError(f"no adapter is possible on {group!r}; choose from {allowed}", group=group)
        if rank and group not in present:
            raise TrainingError(f"the adapter's group {group!r} matches nothing in this model", group=group)
