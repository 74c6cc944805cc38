"""The vision tower's blocks over integer weights, fp32 between products: the specification of csrc/vision.*.

Attention is full within a frame. Scaled queries, keys, values and unnormalised weights are rounded to bf16,
sums are fp32. The native twin walks over the keys with a running maximum, so the two agree to the rounding of
the weights, not bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from duomo.kernels.reference.norm import layernorm
from duomo.kernels.reference.packed import packed_linear
from duomo.kernels.reference.rope import rotate_halves
from duomo.kernels.weights import IntWeight


class Norm(NamedTuple):
    """A LayerNorm over C columns."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight.float(), self.bias.float(), self.eps)


class Affine(NamedTuple):
    """x W^T + b by int8 activations."""

    weight: IntWeight
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight) + self.bias.float()


class BlockWeights(NamedTuple):
    """Of one pre-LayerNorm block; the rows of `qkv` are q, k, v."""

    norm1: Norm
    qkv: Affine
    out: Affine
    norm2: Norm
    fc1: Affine
    fc2: Affine


def frame_attention(query_PNH: Tensor, key_PNH: Tensor, value_PNH: Tensor, frames: Sequence[int]) -> Tensor:
    """Softmax attention of each frame's patches over themselves; fp32 [P, N, H]. `frames` are lengths."""
    scale = math.log2(math.e) / math.sqrt(query_PNH.shape[-1])
    rounded = (x.float().bfloat16().float() for x in (query_PNH.float() * scale, key_PNH, value_PNH))
    outputs = [
        _attend(*(x.transpose(0, 1) for x in frame)).transpose(0, 1)
        for frame in zip(*(x.split(list(frames)) for x in rounded), strict=True)
    ]
    return torch.cat(outputs) if outputs else torch.zeros(query_PNH.shape)


def _attend(query_NPH: Tensor, key_NPH: Tensor, value_NPH: Tensor) -> Tensor:
    scores = query_NPH @ key_NPH.transpose(1, 2)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights.bfloat16().float() @ value_NPH) / weights.sum(-1, keepdim=True)


def vision_attention(
    hidden_PC: Tensor,
    norm: Norm,
    qkv: Affine,
    out: Affine,
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    """hidden + out(attention(qkv(norm(hidden)))), queries and keys turned by halves; in hidden's dtype."""
    wide = hidden_PC.float()
    query, key, value = qkv(norm(wide)).unflatten(-1, (3, num_heads, -1)).unbind(1)
    query, key = rotate_halves(query, cos_PQ, sin_PQ), rotate_halves(key, cos_PQ, sin_PQ)
    attended = frame_attention(query, key, value, frames).flatten(1)
    return (wide + out(attended)).to(hidden_PC.dtype)


def vision_mlp(hidden_PC: Tensor, norm: Norm, fc1: Affine, fc2: Affine) -> Tensor:
    """hidden + fc2(quick_gelu(fc1(norm(hidden)))), in hidden's dtype."""
    wide = hidden_PC.float()
    middle = fc1(norm(wide))
    return (wide + fc2(middle * torch.sigmoid(1.702 * middle))).to(hidden_PC.dtype)


def vision_blocks(
    hidden_PC: Tensor,
    blocks: Sequence[BlockWeights],
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    """All blocks of the tower, fp32 from the first to the last; the result in hidden's dtype."""
    wide = hidden_PC.float()
    for block in blocks:
        wide = vision_attention(wide, *block[:3], cos_PQ, sin_PQ, frames, num_heads)
        wide = vision_mlp(wide, *block[3:])
    return wide.to(hidden_PC.dtype)
