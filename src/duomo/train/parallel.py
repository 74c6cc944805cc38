"""One step over several processes: experts placed, everything else sharded by FSDP2. Same gradients as one.

Each process holds E/n experts of every bank. Tokens travel to their experts and back by two all-to-alls, in
the forward pass and again in the backward one. The rest (attention, norms, embeddings, tower, resampler) is
sharded by `fully_shard`, a layer at a time; routers are small, and whole everywhere. A process without
pictures takes part in every exchange all the same, with nothing to send: a collective that one process skips
is a hang, not an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from duomo.errors import TrainingError
from duomo.kernels import swiglu
from duomo.model import Ernie
from duomo.model.experts import ExpertBank, Experts, Router
from duomo.model.inputs import Batch


class _Exchange(torch.autograd.Function):
    """Rows to the processes that `sent` says, `received` from each; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _exchange(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(grad, ctx.received, ctx.sent), None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent)
    return out


class PlacedParameter(nn.Parameter):
    """The part of a bank's weights that one process holds; in the other processes lie other experts'."""


class PlacedBank(nn.Module):
    """The experts of a bank that this process holds: [E/n, ...], expert `rank * E/n` first."""

    def __init__(self, base: ExpertBank, rank: int, num_processes: int) -> None:
        super().__init__()
        num_experts = base.down.shape[0]
        if num_experts % num_processes:
            raise TrainingError(f"{num_experts} experts cannot be placed evenly on {num_processes} processes")
        self.count, self.num_processes = num_experts // num_processes, num_processes
        own = slice(rank * self.count, (rank + 1) * self.count)
        self.router = base.router
        # Each process's loss counts n-fold in the mean that FSDP takes; experts see all of them in full.
        self.gate_up = self._own(base.gate_up, own)
        self.down = self._own(base.down, own)

    def _own(self, whole: nn.Parameter, own: slice) -> nn.Parameter:
        part: nn.Parameter = PlacedParameter(whole.detach()[own].clone(), requires_grad=whole.requires_grad)
        if part.requires_grad:
            part.register_hook(lambda grad: grad / self.num_processes)
        return part

    def forward(
        self, hidden_TD: Tensor, chosen_TK: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        routing = self.router(hidden_TD)
        num_chosen = routing.expert_ids_TK.shape[1]
        pairs = routing.expert_ids_TK.flatten()
        order = pairs.argsort(stable=True)
        counts = torch.bincount(pairs, minlength=self.count * self.num_processes)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts)  # [n, E/n]: from each process, for each of our experts
        per_process = arriving.view(self.num_processes, self.count)
        sent = counts.view(self.num_processes, self.count).sum(1).tolist()
        received = per_process.sum(1).tolist()
        inputs = _Exchange.apply(hidden_TD[order // num_chosen], sent, received)  # type: ignore[no-untyped-call]
        outputs = self._compute(inputs, per_process)
        returned = _Exchange.apply(outputs, received, sent)  # type: ignore[no-untyped-call]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        pairs_TKD = returned[place].unflatten(0, (hidden_TD.shape[0], num_chosen))
        weighted: Tensor = pairs_TKD * routing.weights_TK[..., None]
        return weighted.sum(1)

    def _compute(self, inputs: Tensor, per_process: Tensor) -> Tensor:
        """Rows come by process, and by expert within each; experts take theirs from all processes."""
        expert_of_row = torch.arange(self.count, device=inputs.device).repeat(self.num_processes)
        expert_of_row = expert_of_row.repeat_interleave(per_process.flatten())
        order = expert_of_row.argsort(stable=True)
        split = inputs[order].split(per_process.sum(0).tolist())
        outputs = [F.linear(swiglu(F.linear(x, self.gate_up[e])), self.down[e]) for e, x in enumerate(split)]
        return torch.empty_like(inputs).index_copy(0, order, torch.cat(outputs))


class PlacedExperts(nn.Module):
    """`Experts` that calls every bank in every pass, whatever tokens this process has."""

    def __init__(self, base: Experts, rank: int, num_processes: int) -> None:
        super().__init__()
        self.text = PlacedBank(base.text, rank, num_processes)
        self.vision = PlacedBank(base.vision, rank, num_processes) if base.vision is not None else None
        self.shared = base.shared

    def forward(self, hidden_TD: Tensor, batch: Batch, chosen_TK: Tensor | None = None) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        out_TD = out_TD.index_copy(0, batch.text_rows, self.text(hidden_TD[batch.text_rows]))
        if self.vision is not None:
            out_TD = out_TD.index_copy(0, batch.vision_rows, self.vision(hidden_TD[batch.vision_rows]))
        return out_TD if self.shared is None else out_TD + self.shared(hidden_TD)


def distribute(model: Ernie, mesh: DeviceMesh) -> Ernie:
    """Places the experts of `model` and shards the rest over a one-dimensional mesh, in place."""
    rank, size = mesh.get_local_rank(), mesh.size()
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, Experts):
            layer.mlp = PlacedExperts(layer.mlp, rank, size)
    placed = (p for p in model.parameters() if isinstance(p, PlacedParameter))
    apart = {*placed, *router_parameters(model)}
    shards: list[nn.Module] = list(model.decoder.layers)
    shards += [part for part in (model.vision_tower, model.resampler) if part is not None]
    for module in [*shards, model]:
        fully_shard(module, mesh=mesh, ignored_params=apart)
    for name in ("encode", "unembed"):  # they use the root's weights without being its `forward`
        register_fsdp_forward_method(model, name)
    return model


def router_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Router):
            yield from (module.weight, module.bias)


def fill_gradients(model: nn.Module) -> None:
    """Zeros where no token came: an optimizer passes over a missing gradient, and goes on with one of zeros.

    Which parameters a process's tokens reach depends on how packs are shared; what a step does must not.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Sums over all processes, in place, the same bits in each. All must have the same tensors."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of parameters that are whole in every process, as FSDP averages those of the parted ones."""
    grads = [p.grad for p in parameters if p.requires_grad and p.grad is not None]
    add_up(grads)
    for grad in grads:
        grad.div_(dist.get_world_size())


@torch.no_grad()
def clip_(model: nn.Module, most: float, is_shared: bool) -> float:
    """`clip_grad_norm_` over sharded, placed and whole parameters alike; returns the norm before.

    Squares are added in fp64: torch's fp32 norm is off by 2e-5, which no two ways of sharing would repeat.
    """
    shared, alone = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    grads = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    for parameter, grad in grads:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        square = torch.linalg.vector_norm(local, dtype=torch.float64).square().cpu()
        if isinstance(parameter, PlacedParameter) or isinstance(grad, DTensor):
            shared += square
        else:
            alone += square
    if is_shared:
        dist.all_reduce(shared)
    norm = float((shared + alone).sqrt())
    if norm > most:
        for _, grad in grads:
            grad.mul_(most / (norm + 1e-6))
    return norm
