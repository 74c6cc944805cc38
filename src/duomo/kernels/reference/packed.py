"""Products over packed weights: the specification that the native kernels match bit for bit.

y[t, n] = multiplier[n] * (half 0 + half 1)
half    = sum over the blocks b of half a row of scale[t, b] * (integer sum over block b of level * q)

The activations are rotated and rounded to int8, one scale a block; a half is added up in rising order, one
multiplication and one addition at a time in fp32, and an odd block in the middle belongs to the first. An
integer sum stays below 127 * 127 * 128 = 2.1 million, which fp32 holds exactly, so the plain float product
below is exact whatever order it adds in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.kernels.reference.rope import rotate_pairs
from duomo.kernels.weights import IntWeight, PackedWeight, TrellisWeight

LEAST_PEAK = 1e-30
"""A block whose largest value is not above this counts as zero: 127 / peak would overflow."""


class Activations(NamedTuple):
    """`q` int8 [T, K]; `scale` fp32 [T, K/block]: x is about q * scale, rotated."""

    q: Tensor
    scale: Tensor


def rotate(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """x[..., K] fp32 -> H (signs * x), block by block; half = 1, 2, 4, ... as trellis.hadamard does."""
    y = (x * signs).contiguous()
    half = 1
    while half < block:
        first, second = y.reshape(-1, block // (2 * half), 2, half).unbind(2)
        y = torch.stack((first + second, first - second), dim=2)
        half *= 2
    return y.reshape(x.shape) * torch.tensor(block**-0.5, dtype=torch.float32)


def unrotate(x: Tensor, signs: Tensor | None, block: int) -> Tensor:
    """The inverse of `rotate`; the identity where there are no signs."""
    return x if signs is None else rotate(x, torch.ones_like(signs), block) * signs


def packed_rows(ids_T: Tensor, weight: IntWeight) -> Tensor:
    """Rows of a matrix of integers by their numbers, turned back: fp32 [..., K]."""
    scale = torch.from_numpy(weight.stored.row_scale)[ids_T].float()
    return unrotate(weight.rows_of(ids_T).float() * scale[..., None], weight.signs, weight.block)


def quantize_activations(x_TK: Tensor, signs: Tensor | None, block: int) -> Activations:
    """Rotated, then rounded to nearest even, one scale a block."""
    wide = x_TK.float()
    blocks = (wide if signs is None else rotate(wide, signs.to(wide.device), block)).unflatten(
        -1, (-1, block)
    )
    peak = blocks.abs().amax(-1)
    is_zero = ~(peak > LEAST_PEAK)
    inverse = torch.where(is_zero, 0.0, 127.0 / peak)
    q = (blocks * inverse[..., None]).round().to(torch.int8)
    return Activations(q.flatten(-2), torch.where(is_zero, 0.0, peak / 127.0))


def packed_linear(x: Tensor, weight: PackedWeight, index: int = 0) -> Tensor:
    """x[..., K] -> [..., N] in x's dtype, by matrix `index` of a bank."""
    rows = x.reshape(-1, weight.columns)
    return _product(rows, weight, index).to(x.dtype).reshape(*x.shape[:-1], weight.rows)


def _product(x_TK: Tensor, weight: PackedWeight, index: int) -> Tensor:
    q, scale = quantize_activations(x_TK, weight.signs, weight.block)
    levels = weight.levels(index).to(x_TK.device).float()
    num_blocks = scale.shape[-1]
    halves = torch.zeros(2, x_TK.shape[0], weight.rows, device=x_TK.device)
    for block in range(num_blocks):
        inputs = slice(block * weight.block, (block + 1) * weight.block)
        half = halves[int(2 * block >= num_blocks)]
        half += scale[:, block, None] * (q[:, inputs].float() @ levels[:, inputs].T)
    return (halves[0] + halves[1]) * weight.multiplier(index).to(x_TK.device)


def packed_experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, gate_up: TrellisWeight, down: TrellisWeight
) -> Tensor:
    """As `experts`, over banks gate_up [E, 2F, D] and down [E, D, F]; fp32 between the two products."""
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    terms = torch.zeros(*expert_ids_TK.shape, down.rows, device=hidden_TD.device)
    for expert in expert_ids_TK.unique().tolist():
        token, choice = (expert_ids_TK == expert).nonzero(as_tuple=True)
        gate, up = _product(hidden_TD[token].float(), gate_up, expert).chunk(2, dim=-1)
        terms[token, choice] = _product(F.silu(gate) * up, down, expert)
    for choice in range(expert_ids_TK.shape[1]):
        out_TD = out_TD + weights_TK[:, choice, None].float() * terms[:, choice]
    return out_TD.to(hidden_TD.dtype)


def packed_mlp(x_TD: Tensor, gate: TrellisWeight, up: TrellisWeight, down: TrellisWeight) -> Tensor:
    """down(silu(gate x) * up x) in fp32 throughout; the result in x's dtype."""
    wide = x_TD.float()
    middle = F.silu(_product(wide, gate, 0)) * _product(wide, up, 0)
    return _product(middle, down, 0).to(x_TD.dtype)


def packed_qkv(
    x_TD: Tensor, q: TrellisWeight, k: TrellisWeight, v: TrellisWeight, cos_TP: Tensor, sin_TP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed hidden states -> rotated queries [T, N, H] and keys [T, G, H], values [T, G, H]; H is 2P."""
    heads = (-1, 2 * cos_TP.shape[-1])
    query, key, value = (_product(x_TD.float(), weight, 0).unflatten(-1, heads) for weight in (q, k, v))
    query, key = rotate_pairs(query, cos_TP, sin_TP), rotate_pairs(key, cos_TP, sin_TP)
    return query.to(x_TD.dtype), key.to(x_TD.dtype), value.to(x_TD.dtype)
