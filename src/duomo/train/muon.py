"""Muon for matrices, AdamW for the rest, in one optimizer.

A matrix moves by its momentum made orthogonal (all singular values near one), so that directions which
gradients rarely name are learned as fast as the common ones. Source: Jordan et al., "Muon" (2024); the factor
that lets both kinds share one rate: Liu et al., "Muon is scalable" (2025), equation 4. Processes share
the work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from duomo.train.parallel import add_up

MIN_SIDE = 32  # rows and columns of a matrix that is worth it: routers and adapters are no such
NUM_ITERATIONS = 5
# Of the quintic a*x + b*x^3 + c*x^5 that pushes every singular value into about 0.7..1.2.
QUINTIC = 3.4445, -4.7750, 2.0315
SAME_SIZE = 0.2  # of an update's mean square, like AdamW's


def is_wide(parameter: Tensor) -> bool:
    """May it be moved as matrices [..., rows, columns]?"""
    return parameter.ndim > 1 and min(parameter.shape[-2:]) >= MIN_SIDE


class Muon(torch.optim.Optimizer):
    """Groups with `is_matrix` hold matrices [..., rows, columns], moved one by one; others take AdamW.

    In a group of torch.distributed every process must hold the same parameters and gradients.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(groups, {**defaults, "weight_decay": 0.0, "is_matrix": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Parameters without a gradient stay as they are."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            for parameter in moving:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["is_matrix"]:
                self._move_matrices(moving, group)
            else:
                for parameter in moving:
                    self._move(parameter, group)

    def _move_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Matrices of one shape are made orthogonal together: many small products are one larger."""
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            ahead = gradient.lerp(state["momentum"], group["momentum"])
            rows, columns = parameter.shape[-2:]
            alike[rows, columns].append((parameter, ahead.reshape(-1, rows, columns)))
        stacks = [torch.cat([ahead for _, ahead in found]) for found in alike.values()]
        for (shape, found), moves in zip(alike.items(), orthogonal_together(stacks), strict=True):
            moves.mul_(SAME_SIZE * max(shape) ** 0.5)
            counts = [ahead.shape[0] for _, ahead in found]
            for (parameter, _), move in zip(found, moves.split(counts), strict=True):
                parameter.sub_(move.reshape(parameter.shape), alpha=group["lr"])

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        done = int(state["step"])
        first, second = group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (state["square"] / (1 - second**done)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], size, value=-group["lr"] / (1 - first**done))


def orthogonal_together(stacks: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of every stack; each process of a group does its share of the matrices."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [orthogonal(stack) for stack in stacks]
    own, found = slice(dist.get_rank(), None, dist.get_world_size()), [torch.zeros_like(x) for x in stacks]
    for stack, moves in zip(stacks, found, strict=True):
        if len(stack[own]):
            moves[own] = orthogonal(stack[own])
    add_up(found)
    return found


def orthogonal(matrices_BNK: Tensor) -> Tensor:
    """The nearest matrices whose singular values are all near one, by Newton-Schulz in bfloat16; fp32."""
    is_tall = matrices_BNK.shape[-2] > matrices_BNK.shape[-1]
    x = matrices_BNK.mT if is_tall else matrices_BNK
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).bfloat16()
    a, b, c = QUINTIC
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    found: Tensor = x.mT if is_tall else x
    return found.float()
