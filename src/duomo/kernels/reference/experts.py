"""A bank of routed experts over tokens: sort the (token, expert) pairs by expert, one product per expert.

No Python loop over tokens and no boolean mask. The one wait for a device is the count of pairs per expert.
A token's result is the sum of its own K terms in the order of its choice, whatever runs beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.kernels.reference.linear import linear


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: silu(first half) * second half."""
    return gated(*gate_up.chunk(2, dim=-1))


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's K experts of weight * down(silu(gate x) * up x). Returns [T, D].

    gate_up_EFD is [E, 2F, D] with the gate's rows first; down_EDF is [E, D, F].
    """
    num_tokens, num_chosen = expert_ids_TK.shape
    pair_experts = expert_ids_TK.flatten()
    order = pair_experts.argsort(stable=True)
    counts: list[int] = torch.bincount(pair_experts, minlength=gate_up_EFD.shape[0]).tolist()
    inputs = hidden_TD[order // num_chosen].split(counts)
    # unbind, for the backward pass: indexing would make a gradient of the whole bank for every expert.
    weights = zip(gate_up_EFD.unbind(), down_EDF.unbind(), strict=True)
    outputs = [
        linear(swiglu(linear(rows, gate_up_FD)), down_DF)
        for rows, (gate_up_FD, down_DF) in zip(inputs, weights, strict=True)
        if rows.shape[0]
    ]
    if not outputs:
        return torch.zeros_like(hidden_TD)
    place_of_pair = torch.empty_like(order)
    place_of_pair[order] = torch.arange(order.numel(), device=order.device)
    pairs_TKD: Tensor = torch.cat(outputs)[place_of_pair].unflatten(0, (num_tokens, num_chosen))
    return (pairs_TKD * weights_TK[..., None]).sum(1)
