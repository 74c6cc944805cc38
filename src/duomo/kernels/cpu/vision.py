"""The vision tower's blocks by csrc/vision*.cpp; the reference says what they are.

Addresses go down unchecked, so everything about shape, dtype and contiguity is settled here. Memory between
the products belongs to one pass through the tower and goes with it: no block allocates anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duomo.errors import KernelError
from duomo.kernels.cpu.packed import plain
from duomo.kernels.reference.vision import Affine, BlockWeights, Norm

if TYPE_CHECKING:
    from duomo._native import VisionScratch

HEAD_MULTIPLE, MOST_HEAD_DIM = 16, 128


def takes_heads(head_dim: int) -> bool:
    return head_dim % HEAD_MULTIPLE == 0 and 0 < head_dim <= MOST_HEAD_DIM


def frame_attention(query_PNH: Tensor, key_PNH: Tensor, value_PNH: Tensor, frames: Sequence[int]) -> Tensor:
    from duomo import _native

    query, key, value = (plain(x) for x in (query_PNH, key_PNH, value_PNH))
    if not query.shape == key.shape == value.shape:
        raise KernelError("queries, keys and values of a frame have one shape")
    patches, num_heads, head_dim = query.shape
    out = torch.empty(query.shape)
    places = (query.data_ptr(), key.data_ptr(), value.data_ptr())
    lengths = _lengths(frames, patches)
    _native.frame_attention(_native.VisionScratch(), *places, lengths, num_heads, head_dim, out.data_ptr())
    return out


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
    from duomo import _native

    sums = plain(hidden_PC).clone()
    _add_attention(_native.VisionScratch(), sums, norm, qkv, out, cos_PQ, sin_PQ, frames, num_heads)
    return sums.to(hidden_PC.dtype)


def vision_mlp(hidden_PC: Tensor, norm: Norm, fc1: Affine, fc2: Affine) -> Tensor:
    from duomo import _native

    sums = plain(hidden_PC).clone()
    _add_mlp(_native.VisionScratch(), sums, norm, fc1, fc2)
    return sums.to(hidden_PC.dtype)


def vision_blocks(
    hidden_PC: Tensor,
    blocks: Sequence[BlockWeights],
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    from duomo import _native

    sums, scratch = plain(hidden_PC).clone(), _native.VisionScratch()
    for block in blocks:
        _add_attention(scratch, sums, *block[:3], cos_PQ, sin_PQ, frames, num_heads)
        _add_mlp(scratch, sums, *block[3:])
    return sums.to(hidden_PC.dtype)


def _add_attention(
    scratch: VisionScratch,
    sums_PC: Tensor,
    norm: Norm,
    qkv: Affine,
    out: Affine,
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> None:
    from duomo import _native

    patches, width = sums_PC.shape
    cos, sin = plain(cos_PQ), plain(sin_PQ)
    head_dim = width // num_heads
    if not cos.shape == sin.shape == (patches, head_dim // 2):
        raise KernelError(f"angles of {tuple(cos.shape)} for {patches} patches and heads of {head_dim}")
    places, layers = (cos.data_ptr(), sin.data_ptr()), (*_affine(qkv), *_affine(out))
    lengths = _lengths(frames, patches)
    _native.vision_attention(
        scratch, sums_PC.data_ptr(), _norm(norm), *layers, *places, lengths, num_heads, head_dim
    )


def _add_mlp(scratch: VisionScratch, sums_PC: Tensor, norm: Norm, fc1: Affine, fc2: Affine) -> None:
    from duomo import _native

    patches, width = sums_PC.shape
    if width != fc1.weight.columns:
        raise KernelError(
            f"patches of width {width} for a matrix of {fc1.weight.rows} x {fc1.weight.columns}"
        )
    _native.vision_mlp(scratch, sums_PC.data_ptr(), patches, _norm(norm), *_affine(fc1), *_affine(fc2))


def _lengths(frames: Sequence[int], patches: int) -> npt.NDArray[np.int64]:
    if sum(frames) != patches or any(length < 1 for length in frames):
        raise KernelError(f"frames of {list(frames)[:8]} patches do not make up {patches}")
    return np.asarray(frames, np.int64)


def _norm(norm: Norm) -> Any:
    from duomo import _native

    return _native.Norm(plain(norm.weight).numpy(), plain(norm.bias).numpy(), norm.eps)


def _affine(layer: Affine) -> tuple[Any, npt.NDArray[np.float32]]:
    return layer.weight.native, plain(layer.bias).numpy()
