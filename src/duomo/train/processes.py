"""The processes of a run: how they start, what they add up, and how state is put together and parted.

The loop is written for one process; `Processes` is what it asks where there may be more. Where the weights
are what is large, each process holds a part of them (`train.parallel`). Adapters, preferences, rewards and
Muon need whole ones: there every process has all, takes its share of a step's packs, and gradients are
averaged. A saved state is always whole, so a run may go on in any number of processes. Started by
`duomo train --processes N` on one machine, or by `torchrun -m duomo train ...` on several.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from duomo.errors import Error, TrainingError
from duomo.train.objectives import StepReport
from duomo.train.parallel import (
    PlacedParameter,
    average,
    clip_,
    distribute,
    fill_gradients,
    router_parameters,
)
from duomo.train.routing import Usage
from duomo.train.settings import Settings


@dataclass(frozen=True, slots=True)
class Processes:
    """One process unless `size` says otherwise; `mesh` where the weights are parted among them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def own(self) -> slice:
        """Which of a step's packs this process takes."""
        return slice(self.rank, None, self.size)

    @property
    def is_parted(self) -> bool:
        return self.mesh is not None

    @classmethod
    def join(cls, settings: Settings) -> Processes:
        """The processes this one was started among. TrainingError for a recipe that they cannot share."""
        if not dist.is_initialized():
            if not dist.is_torchelastic_launched():
                return cls()
            dist.init_process_group(_backend(settings))
        size = dist.get_world_size()
        if size == 1:
            return cls()
        check(settings, size)
        rank = dist.get_rank()
        if needs_whole(settings):
            return cls(rank, size)
        return cls(rank, size, init_device_mesh(settings.device.partition(":")[0], (size,)))

    def place(self, model: Any) -> None:
        if self.mesh is not None:
            distribute(model, self.mesh)

    def add_up(self, report: StepReport, usage: Usage) -> StepReport:
        """A step's report and expert usage over all processes, on each."""
        if self.size == 1:
            return report
        for counts in usage.counts.values():
            dist.all_reduce(counts)
        total = StepReport()
        for one in self.gather(report):
            for name in ("loss", "num_tokens", "num_supervised", "num_right", "num_judged"):
                setattr(total, name, getattr(total, name) + getattr(one, name))
            for name, value in one.values.items():
                total.values[name] += value
        return total

    def clip(self, model: nn.Module, most: float) -> float:
        """Completes the gradients of a step and clips them by their common norm; returns the norm before."""
        fill_gradients(model)
        if self.is_parted:
            average(router_parameters(model))
        elif self.size > 1:
            average(model.parameters())
        return clip_(model, most, self.is_parted)

    def gather(self, own: Any) -> list[Any]:
        """`own` of every process, in their order. Everybody must call it."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def whole(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """`value`, shaped like `parameter` or like its part here, put together. Everybody must call it."""
        value = value.detach()
        if isinstance(value, DTensor):
            return value.full_tensor()
        if isinstance(parameter, PlacedParameter) and value.ndim:
            parts = [torch.empty_like(value) for _ in range(self.size)]
            dist.all_gather(parts, value.contiguous())
            return torch.cat(parts)
        return value

    def part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What of a whole `value` lies in this process."""
        if isinstance(parameter, DTensor) and value.ndim:
            return distribute_tensor(value, parameter.device_mesh, parameter.placements)
        if isinstance(parameter, PlacedParameter) and value.ndim:
            return value.chunk(self.size)[self.rank].clone()
        return value

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def needs_whole(settings: Settings) -> bool:
    """Does every process need the whole model? What trains is small, or answers are drawn, or moved whole."""
    return settings.lora is not None or settings.stage in ("dpo", "grpo") or settings.optimizer == "muon"


def check(settings: Settings, size: int) -> None:
    """TrainingError unless this recipe can run in `size` processes."""
    if settings.packs_per_step % size:
        raise TrainingError(
            f"{size} processes share the packs of a step evenly; packs_per_step={settings.packs_per_step} "
            f"is no multiple of {size}"
        )


def run_recipe_in(count: int, work: Callable[[Settings], object], settings: Settings) -> int:
    """Runs `work(settings)` in `count` processes of this machine; returns the exit code."""
    check(settings, count)
    return run_in(count, partial(work, settings), _backend(settings))


def run_in(count: int, work: Callable[[], object], backend: str = "gloo") -> int:
    """Runs `work()` in `count` processes of this machine, as one torch.distributed group.

    Returns the exit code. An error that all meet is told once, by the first; the death of one ends all.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    try:
        spawn(_enter, (count, port, work, backend), nprocs=count)
    except ProcessExitedException as ended:
        return ended.exit_code if ended.exit_code > 0 else 1
    return 0


def _backend(settings: Settings) -> str:
    return "nccl" if settings.device.startswith("cuda") else "gloo"


def _enter(rank: int, count: int, port: int, work: Callable[[], object], backend: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=count)
    try:
        work()
    except Error as error:
        if rank == 0:
            print(f"duomo: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        dist.destroy_process_group()
