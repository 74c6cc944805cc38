"""Products over packed weights by csrc/packed*.cpp and csrc/experts.cpp; the reference says what they are.

Pointers go down unchecked, so everything about shape, dtype and contiguity is settled here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from duomo.errors import KernelError
from duomo.kernels.reference.packed import Activations
from duomo.kernels.reference.router import Routing
from duomo.kernels.weights import IntWeight, PackedWeight, TrellisWeight


def plain(x: Tensor) -> Tensor:
    """fp32 and contiguous, on the CPU."""
    if x.device.type != "cpu":
        raise KernelError(f"the native kernels take tensors on the CPU, not on {x.device}")
    return x.detach().float().contiguous()


def quantize_activations(x_TK: Tensor, signs: Tensor | None, block: int) -> Activations:
    from duomo import _native

    rows = plain(x_TK)
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
    rows = plain(x).reshape(-1, weight.columns)
    out = torch.empty(rows.shape[0], weight.rows)
    if isinstance(weight, IntWeight):
        weight.native.linear(rows.data_ptr(), rows.shape[0], out.data_ptr())
    else:
        weight.native.linear(index, rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def packed_rows(ids_T: Tensor, weight: IntWeight) -> Tensor:
    ids = ids_T.to(torch.int64).contiguous()
    out = torch.empty(*ids.shape, weight.columns)
    weight.native.rows(ids.data_ptr(), ids.numel(), out.data_ptr())
    return out


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
    hidden, weights = plain(hidden_TD), plain(weights_TK)
    ids = expert_ids_TK.to(torch.int64).contiguous()
    out = torch.empty(tokens, down.rows)
    pointers = (hidden.data_ptr(), ids.data_ptr(), weights.data_ptr())
    _native.experts(gate_up.native, down.native, *pointers, tokens, chosen, out.data_ptr())
    return out.to(hidden_TD.dtype)


def packed_mlp(x_TD: Tensor, gate: TrellisWeight, up: TrellisWeight, down: TrellisWeight) -> Tensor:
    from duomo import _native

    rows = plain(x_TD)
    _check_width(rows, gate)
    out = torch.empty(rows.shape[0], down.rows)
    _native.mlp(gate.native, up.native, down.native, rows.data_ptr(), rows.shape[0], out.data_ptr())
    return out.to(x_TD.dtype)


def packed_qkv(
    x_TD: Tensor, q: TrellisWeight, k: TrellisWeight, v: TrellisWeight, cos_TP: Tensor, sin_TP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from duomo import _native

    rows, tokens, head_dim = plain(x_TD), x_TD.shape[0], 2 * cos_TP.shape[-1]
    _check_width(rows, q)
    out = [torch.empty(tokens, weight.rows) for weight in (q, k, v)]
    angles = plain(cos_TP), plain(sin_TP)
    assert angles[0].shape == angles[1].shape == (tokens, head_dim // 2), "one angle a token and pair"
    places = [x.data_ptr() for x in (*angles, *out)]
    _native.qkv(q.native, k.native, v.native, rows.data_ptr(), tokens, head_dim, *places)
    query, key, value = (x.to(x_TD.dtype).unflatten(-1, (-1, head_dim)) for x in out)
    return query, key, value


def route(
    hidden_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_chosen: int, norm_min: float = 1e-12
) -> Routing:
    """As the reference, but for `logits_TE`, which training alone needs: an empty tensor."""
    from duomo import _native

    hidden, router, bias = plain(hidden_TD), plain(router_ED), plain(bias_E)
    tokens, (num_experts, width) = hidden.shape[0], router.shape
    if hidden.shape[1] != width or bias.shape != (num_experts,):
        raise KernelError(f"hidden of width {hidden.shape[1]} for a router of {num_experts} x {width}")
    ids = torch.empty(tokens, num_chosen, dtype=torch.int64)
    weights = torch.empty(tokens, num_chosen)
    places = (hidden.data_ptr(), router.data_ptr(), bias.data_ptr())
    sizes = (tokens, width, num_experts, num_chosen)
    _native.route(*places, *sizes, norm_min, ids.data_ptr(), weights.data_ptr())
    return Routing(ids, weights.to(hidden_TD.dtype), torch.empty(0))


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from duomo import _native

    rows, scale = plain(x), plain(weight)
    out = torch.empty_like(rows)
    width = rows.shape[-1]
    assert scale.shape == (width,), "one weight a column"
    tokens = rows.numel() // width
    _native.rmsnorm(rows.data_ptr(), scale.data_ptr(), eps, tokens, width, out.data_ptr())
    return out.to(x.dtype)


def _check_width(rows_TD: Tensor, weight: TrellisWeight) -> None:
    if rows_TD.ndim != 2 or rows_TD.shape[1] != weight.columns:
        raise KernelError(f"inputs {tuple(rows_TD.shape)} for a matrix of {weight.rows} x {weight.columns}")
