"""The vision tower's blocks, packed or plain, fp32 between products: the specification of csrc/vision.*.

Attention is full within a frame. Where products round their inputs (integers, rounded panels), scaled
queries, keys, values and unnormalised weights are rounded to bf16; sums are fp32. The native twin walks over
the keys with a running maximum, so the two agree to the rounding of the weights, not bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from duomo.kernels.reference.linear import dense_linear
from duomo.kernels.reference.norm import layernorm
from duomo.kernels.reference.packed import packed_linear
from duomo.kernels.reference.rope import rotate_halves
from duomo.kernels.weights import DenseForm, DenseWeight, IntWeight


class Norm(NamedTuple):
    """A LayerNorm over C columns."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight.float(), self.bias.float(), self.eps)


class Affine(NamedTuple):
    """x W^T + b, by int8 activations or over a plain matrix, which has no bias of its own."""

    weight: IntWeight | DenseWeight
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight
        y = dense_linear(x, weight) if isinstance(weight, DenseWeight) else packed_linear(x, weight)
        return y + self.bias.float()

    @property
    def is_rounded(self) -> bool:
        """Its inputs lose bits on the way into a product."""
        return isinstance(self.weight, IntWeight) or self.weight.form is DenseForm.ROUNDED


class BlockWeights(NamedTuple):
    """Of one pre-LayerNorm block; the rows of `qkv` are q, k, v."""

    norm1: Norm
    qkv: Affine
    out: Affine
    norm2: Norm
    fc1: Affine
    fc2: Affine


def frame_attention(
    query_PNH: Tensor,
    key_PNH: Tensor,
    value_PNH: Tensor,
    frames: Sequence[int],
    is_rounded: bool = True,
) -> Tensor:
    """Softmax attention of each frame's patches over themselves; fp32 [P, N, H]. `frames` are lengths."""
    scale = math.log2(math.e) / math.sqrt(query_PNH.shape[-1])
    kept = (_rounded(x.float(), is_rounded) for x in (query_PNH.float() * scale, key_PNH, value_PNH))
    outputs = []
    for query, key, value in zip(*(x.transpose(0, 1).split(list(frames), 1) for x in kept), strict=True):
        outputs.append(_attend(query, key, value, is_rounded).transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.zeros(query_PNH.shape)


def _attend(query_NPH: Tensor, key_NPH: Tensor, value_NPH: Tensor, is_rounded: bool) -> Tensor:
    scores = query_NPH @ key_NPH.transpose(1, 2)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (_rounded(weights, is_rounded) @ value_NPH) / weights.sum(-1, keepdim=True)


def _rounded(x: Tensor, is_rounded: bool) -> Tensor:
    return x.bfloat16().float() if is_rounded else x


def vision_attention(
    hidden_PC: Tensor,
    block: BlockWeights,
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    """hidden + out(attention(qkv(norm1(hidden)))), queries and keys turned by halves; in hidden's dtype."""
    wide = hidden_PC.float()
    query, key, value = block.qkv(block.norm1(wide)).unflatten(-1, (3, num_heads, -1)).unbind(1)
    query, key = rotate_halves(query, cos_PQ, sin_PQ), rotate_halves(key, cos_PQ, sin_PQ)
    attended = frame_attention(query, key, value, frames, block.qkv.is_rounded).flatten(1)
    return (wide + block.out(attended)).to(hidden_PC.dtype)


def vision_mlp(hidden_PC: Tensor, block: BlockWeights) -> Tensor:
    """hidden + fc2(quick_gelu(fc1(norm2(hidden)))), in hidden's dtype."""
    wide = hidden_PC.float()
    middle = block.fc1(block.norm2(wide))
    return (wide + block.fc2(middle * torch.sigmoid(1.702 * middle))).to(hidden_PC.dtype)


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
        wide = vision_attention(wide, block, cos_PQ, sin_PQ, frames, num_heads)
        wide = vision_mlp(wide, block)
    return wide.to(hidden_PC.dtype)
