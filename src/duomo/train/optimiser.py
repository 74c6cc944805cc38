"""The optimizer of a run and its rate over time: groups by name, warmup, then a fall to a floor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from duomo.train.groups import optimizer_groups
from duomo.train.muon import Muon, is_wide
from duomo.train.settings import Settings


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Every group knows its name and its peak rate."""
    groups = optimizer_groups(model, settings.rate, settings.rates, settings.weight_decay)
    for group in groups:
        group["peak"] = group["lr"]
    if settings.optimizer == "muon":
        return Muon(_parted(groups), lr=settings.rate, betas=settings.betas, eps=settings.eps)
    return torch.optim.AdamW(groups, lr=settings.rate, betas=settings.betas, eps=settings.eps, fused=True)


def _parted(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Matrices apart from what Muon leaves to AdamW: vectors, embeddings, routers, adapters."""
    found = []
    for group in groups:
        for is_matrix in (True, False):
            of_kind = [p for p in group["params"] if _is_matrix(p, group["group"]) == is_matrix]
            if of_kind:
                found.append({**group, "params": of_kind, "is_matrix": is_matrix})
    return found


def _is_matrix(parameter: nn.Parameter, group: str) -> bool:
    return is_wide(parameter) and group != "embeddings" and not group.endswith("routers")


def rate_factor(settings: Settings, step: int, num_steps: int) -> float:
    """Of the peak rate, at a step from 0."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = max(0, step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    if settings.schedule == "constant":
        return warm
    fall = (1 + math.cos(math.pi * done)) / 2 if settings.schedule == "cosine" else 1 - done
    return warm * (settings.floor + (1 - settings.floor) * fall)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
