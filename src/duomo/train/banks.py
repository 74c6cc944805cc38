"""A bank of experts whose experts are calls: how adapters and packed bases run in training.

The same sum as `kernels.experts`, which takes tensors instead; `tests/train/test_lora.py` compares the two.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from duomo.kernels import swiglu
from duomo.model.experts import Router, note_choice, of_kept


class CallableBank(Protocol):
    """Experts of one modality that compute by a call: plain with factors beside them, or packed."""

    @property
    def router(self) -> Router: ...
    def expert_gate_up(self, x: Tensor, expert: int) -> Tensor: ...
    def expert_down(self, inner: Tensor, expert: int) -> Tensor: ...


def run_experts(
    bank: CallableBank,
    hidden_TD: Tensor,
    chosen_TK: Tensor | None = None,
    rows: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`kernels.experts` for banks that compute an expert by a call: pairs sorted by expert, one call each."""
    routing = bank.router(hidden_TD)
    note_choice(routing.expert_ids_TK, chosen_TK, rows)
    run = partial(_run, bank, routing.logits_TE.shape[-1])
    return of_kept(run, kept, hidden_TD, routing.expert_ids_TK, routing.weights_TK)


def _run(
    bank: CallableBank, num_experts: int, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    num_chosen = expert_ids_TK.shape[1]
    pairs = expert_ids_TK.flatten()
    order = pairs.argsort(stable=True)
    counts: list[int] = torch.bincount(pairs, minlength=num_experts).tolist()
    inputs = hidden_TD[order // num_chosen].split(counts)
    outputs = [
        bank.expert_down(swiglu(bank.expert_gate_up(x, expert)), expert)
        for expert, x in enumerate(inputs)
        if x.shape[0]
    ]
    if not outputs:
        return torch.zeros_like(hidden_TD)
    place_of_pair = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )
    pairs_TKD = torch.cat(outputs)[place_of_pair].unflatten(0, (-1, num_chosen))
    weighted: Tensor = pairs_TKD * weights_TK[..., None]
    return weighted.sum(1)
