"""What a recipe would train, in what memory and time, before it trains anything.

Every trainable tensor is listed by group; a selector that matches nothing is the error it would be in
training. Time is one forward and backward pass of the first step's packs, timed, times the steps: nothing is
stepped, and nothing is written. Memory is counted, not measured; activations are the timed pass's own peak.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from torch.autograd.graph import saved_tensors_hooks

from duomo.train.groups import group_of
from duomo.train.loop import Run
from duomo.train.packing import PackStatistics
from duomo.train.processes import Processes
from duomo.train.progress import Progress
from duomo.train.settings import Settings
from duomo.train.stages import Trained, open_trained


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Tensors as (name, shape) by group; bytes by what they are for; seconds of the whole run."""

    groups: Mapping[str, list[tuple[str, tuple[int, ...]]]]
    num_trainable: int
    num_all: int
    bytes_by_use: Mapping[str, int]
    statistics: PackStatistics
    num_steps: int
    seconds_per_step: float
    rates: Mapping[str, float]
    coverage: Mapping[str, float]  # by modality: experts that the first step's tokens chose

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_use.values())


def plan_recipe(settings: Settings) -> TrainingPlan:
    """TrainingError, CheckpointError as training would raise them."""
    with TemporaryDirectory() as scratch:
        own = msgspec.structs.replace(settings, output=str(Path(scratch) / "run"), tensorboard=False)
        trained = open_trained(own)
        run = Run(own, trained, Progress(own, lambda line: None), Processes())
        seconds, activations = _time_step(run)
        coverage = {
            modality: _coverage(run, modality) for modality in ("text", "vision") if _has(run, modality)
        }
        run.watch.detach()
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    trainable = {n: p for n, p in trained.model.named_parameters() if p.requires_grad}
    for name, parameter in trainable.items():
        groups.setdefault(group_of(name), []).append((name, tuple(parameter.shape)))
    count = sum(p.numel() for p in trainable.values())
    plain = sum(p.nbytes for p in trained.model.parameters())
    uses = {
        "weights": plain + packed_bytes(trained),
        "gradients": sum(p.nbytes for p in trainable.values()),
        "optimizer": sum(
            (1 if group.get("is_matrix") else 2) * p.nbytes  # Muon keeps one moment, AdamW two
            for group in run.optimizer.param_groups
            for p in group["params"]
        ),
        "activations": activations,
    }
    rates = {str(group["group"]): float(group["peak"]) for group in run.optimizer.param_groups}
    num_all = sum(p.numel() for p in trained.model.parameters())
    return TrainingPlan(groups, count, num_all, uses, run.statistics, run.num_steps, seconds, rates, coverage)


def _time_step(run: Run) -> tuple[float, int]:
    """Seconds of the second of two passes, and the bytes that a pass keeps for its gradient."""
    packs = [run.order[index] for index in range(run.settings.packs_per_step)]
    objective = run._objective()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    with saved_tensors_hooks(note, lambda tensor: tensor):
        objective.step(packs)
    run.optimizer.zero_grad()
    started = time.perf_counter()
    objective.step(packs)
    seconds = time.perf_counter() - started
    run.optimizer.zero_grad()
    return seconds, sum(size for place, size in kept.items() if place not in own)


def packed_bytes(trained: Trained) -> int:
    """Of weights that stayed packed; they lie in the mapped file."""
    from duomo.train.frozen import FrozenBank, FrozenEmbedding, FrozenLinear

    total = 0
    for module in trained.model.modules():
        weights: list[Any] = []
        if isinstance(module, FrozenLinear):
            weights = [module.packed]
        elif isinstance(module, FrozenEmbedding):
            weights = [module.base.packed]
        elif isinstance(module, FrozenBank):
            weights = [module.gate_up, module.down]
        total += sum(int(weight.stored.num_bytes) for weight in weights)
    return total


def _has(run: Run, modality: str) -> bool:
    return any(place.modality == modality for place in run.usage.counts)


def _coverage(run: Run, modality: str) -> float:
    counts = [c for place, c in run.usage.counts.items() if place.modality == modality]
    return float(sum((c > 0).sum() for c in counts)) / sum(c.numel() for c in counts)


def plan_lines(plan: TrainingPlan, with_tensors: bool = True) -> list[str]:
    """The plan for people."""
    lines = []
    for group, tensors in plan.groups.items():
        count = sum(torch.Size(shape).numel() for _, shape in tensors)
        lines.append(f"{group}: {len(tensors)} tensors, {count:,} values, rate {plan.rates[group]:g}")
        if with_tensors:
            lines += [f"    {name} {'x'.join(map(str, shape))}" for name, shape in tensors]
    lines.append(f"trains {plan.num_trainable:,} values; the model's plain weights have {plan.num_all:,}")
    lines.append(plan.statistics.line())
    for modality, share in plan.coverage.items():
        lines.append(f"the first step's tokens choose {100 * share:.0f} % of the {modality} experts")
    for use, size in plan.bytes_by_use.items():
        lines.append(f"memory for {use:12s} {size / 1e6:12,.1f} MB")
    lines.append(f"memory in all       {plan.total_bytes / 1e6:14,.1f} MB")
    minutes = plan.num_steps * plan.seconds_per_step / 60
    lines.append(f"{plan.num_steps} steps of {plan.seconds_per_step:.2f} s: about {minutes:.1f} minutes")
    return lines
