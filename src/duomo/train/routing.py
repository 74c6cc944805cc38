"""What the routers did in a forward pass, each with its layer and modality, and the terms made of it.

Losses are taken one bank at a time (`losses.router`), so a collapse of text cannot hide behind vision. A
router that does not train costs nothing and its bias is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from duomo.kernels import Routing
from duomo.model.experts import Router
from duomo.train import losses
from duomo.train.settings import LossSettings, PerModality, coefficient

MODALITIES = ("text", "vision")


class Place(NamedTuple):
    """Where a router stands."""

    layer: int
    modality: str


def router_places(model: nn.Module) -> dict[Router, Place]:
    """Every router of a model; wrappers of adapters in between do not matter."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            match = re.search(r"layers\.(\d+)\.mlp\.(text|vision)\.", name)
            assert match is not None, f"a router at {name}"
            found[module] = Place(int(match[1]), match[2])
    return found


@dataclass(slots=True)
class RouterWatch:
    """Collects every router's routings, in forward order. Nothing is added outside of training passes."""

    seen: list[tuple[Router, Routing]] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, model: nn.Module) -> RouterWatch:
        for module in model.modules():
            if isinstance(module, Router):
                self.handles.append(module.register_forward_hook(self._note))
        return self

    def _note(self, router: nn.Module, inputs: object, routing: Routing) -> None:
        assert isinstance(router, Router)
        if torch.is_grad_enabled():
            self.seen.append((router, routing))

    def take(self) -> list[tuple[Router, Routing]]:
        seen, self.seen = self.seen, []
        return seen

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


class Usage:
    """Tokens that chose each expert, by place: of this step, and `since` the last report."""

    def __init__(self, places: dict[Router, Place]) -> None:
        self.places = places
        self.counts = {place: torch.zeros(router.bias.numel()) for router, place in places.items()}
        self.since = {place: torch.zeros_like(counts) for place, counts in self.counts.items()}

    def add(self, seen: Iterable[tuple[Router, Routing]]) -> None:
        for router, routing in seen:
            place = self.places[router]
            self.counts[place] += torch.bincount(
                routing.expert_ids_TK.flatten().cpu(), minlength=router.bias.numel()
            )

    def clear(self) -> None:
        """Ends a step."""
        for place, counts in self.counts.items():
            self.since[place] += counts
            counts.zero_()

    def imbalance(self, modality: str) -> float:
        """Largest over mean usage, the worst layer; 1 is even, 0 where nothing was routed."""
        found = [c.max() / c.mean() for p, c in self.counts.items() if p.modality == modality and c.any()]
        return float(max(found)) if found else 0.0

    def take_shares(self) -> dict[str, list[list[float]]]:
        """By modality, a row a layer: the share of tokens that chose each expert since the last call."""
        found: dict[str, list[list[float]]] = {}
        for place in sorted(self.since):
            counts = self.since[place] + self.counts[place]
            row = (counts / counts.sum().clamp(min=1)).tolist()
            found.setdefault(place.modality, []).append([round(share, 5) for share in row])
            self.since[place] = -self.counts[place]  # `clear` will add them: they are told already
        return found


def router_terms(
    seen: Iterable[tuple[Router, Routing]], places: dict[Router, Place], settings: LossSettings
) -> dict[str, Tensor]:
    """Weighted sums over layers by term and modality, of routers that train and saw tokens."""
    terms: dict[str, Tensor] = {}

    def add(name: str, modality: str, weight: PerModality, value: Tensor) -> None:
        key = f"{name}/{modality}"
        scaled = coefficient(weight, modality) * value
        terms[key] = terms[key] + scaled if key in terms else scaled

    for router, routing in seen:
        modality = places[router].modality
        if not router.weight.requires_grad or not routing.logits_TE.shape[0]:
            continue
        if coefficient(settings.balance, modality):
            add("balance", modality, settings.balance, losses.balance_loss(router, routing))
        if coefficient(settings.router_z, modality):
            add("router_z", modality, settings.router_z, losses.router_z_loss(routing))
        if coefficient(settings.orthogonality, modality) and not settings.decoupled:
            value = losses.orthogonality_loss(router.weight)
            add("orthogonality", modality, settings.orthogonality, value)
    return terms


def after_step(usage: Usage, settings: LossSettings, rate: float) -> None:
    """What is no gradient: the decoupled orthogonality step and the biases, of routers that train."""
    for router, place in usage.places.items():
        if not router.weight.requires_grad:
            continue
        weight = coefficient(settings.orthogonality, place.modality)
        if settings.decoupled and weight:
            losses.orthogonality_step(router, rate * weight)
        gamma = coefficient(settings.bias_update, place.modality)
        if gamma and usage.counts[place].any():
            losses.nudge_bias(router, usage.counts[place], gamma)
