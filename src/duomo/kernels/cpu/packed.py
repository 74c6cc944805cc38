"""Products over packed weights by csrc/packed*.cpp and csrc/experts.cpp; the reference says what they are.

Pointers go down unchecked, so everything about shape, dtype and contiguity is settled here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from duomo.errors import KernelError
from duomo.kernels.reference.packed import Activations
from duomo.kernels.weights import Int8Weight, PackedWeight, TrellisWeight


def _plain(x: Tensor) -> Tensor:
    """fp32 and contiguous, on the CPU."""
    if x.device.type != "cpu":
        raise KernelError(f"the native kernels take tensors on the CPU, not on {x.device}")
    return x.detach().float().contiguous()


def quantize_activations(x_TK: Tensor, signs: Tensor | None, block: int) -> Activations:
    from duomo import _native

    rows = _plain(x_TK)
    tokens, columns = rows.shape
    q = torch.empty(tokens, columns, dtype=torch.int8)
    scale = torch.empty(tokens, columns // block)
    sums = torch.empty(tokens, columns // block, dtype=torch.int32)
    sign_array = np.zeros(0, np.float32) if signs is None else signs.numpy()
    places = (q.data_ptr(), scale.data_ptr(), sums.data_ptr())
    _native.rotate_quantize(rows.data_ptr(), sign_array, tokens, columns, block, *places)
    return Activations(q, scale)


def packed_linear(x: Tensor, weight: PackedWeight, index: int = 0) -> Tensor:
    if x.shape[-1] != weight.columns:
        raise KernelError(f"inputs of width {x.shape[-1]} for a matrix of {weight.rows} x {weight.columns}")
    rows = _plain(x).reshape(-1, weight.columns)
    out = torch.empty(rows.shape[0], weight.rows)
    if isinstance(weight, Int8Weight):
        weight.native.linear(rows.data_ptr(), rows.shape[0], out.data_ptr())
    else:
        weight.native.linear(index, rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def packed_experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up: TrellisWeight, down: TrellisWeight
) -> Tensor:
    from duomo import _native

    tokens, chosen = expert_ids_TK.shape
    if hidden_TD.shape != (tokens, gate_up.columns) or weights_TK.shape != expert_ids_TK.shape:
        raise KernelError(
            f"hidden {tuple(hidden_TD.shape)}, expert_ids {tuple(expert_ids_TK.shape)} and weights "
            f"{tuple(weights_TK.shape)} do not fit experts of width {gate_up.columns}"
        )
    hidden, weights = _plain(hidden_TD), _plain(weights_TK)
    ids = expert_ids_TK.to(torch.int64).contiguous()
    out = torch.empty(tokens, down.rows)
    pointers = (hidden.data_ptr(), ids.data_ptr(), weights.data_ptr())
    _native.experts(gate_up.native, down.native, *pointers, tokens, chosen, out.data_ptr())
    return out.to(hidden_TD.dtype)
