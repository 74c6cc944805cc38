"""The vision tower by csrc/vision*.cpp, packed or plain; the reference says what it is.

Addresses go down unchecked, so everything about shape, dtype and contiguity is settled here. Memory between
the products belongs to one pass through the tower and goes with it: no block allocates anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from duomo.errors import KernelError
from duomo.kernels.cpu.packed import plain
from duomo.kernels.reference.vision import BlockWeights, Norm
from duomo.kernels.weights import DenseWeight

HEAD_MULTIPLE, MOST_HEAD_DIM = 16, 128


def takes_heads(head_dim: int) -> bool:
    return head_dim % HEAD_MULTIPLE == 0 and 0 < head_dim <= MOST_HEAD_DIM


def frame_attention(
    query_PNH: Tensor,
    key_PNH: Tensor,
    value_PNH: Tensor,
    frames: Sequence[int],
    is_rounded: bool = True,
) -> Tensor:
    from duomo import _native

    query, key, value = (plain(x) for x in (query_PNH, key_PNH, value_PNH))
    if not query.shape == key.shape == value.shape:
        raise KernelError("queries, keys and values of a frame have one shape")
    patches, num_heads, head_dim = query.shape
    out = torch.empty(query.shape)
    places = (query.data_ptr(), key.data_ptr(), value.data_ptr())
    lengths = _lengths(frames, patches)
    _native.frame_attention(*places, lengths, num_heads, head_dim, is_rounded, out.data_ptr())
    return out


def vision_attention(
    hidden_PC: Tensor,
    block: BlockWeights,
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    sums = plain(hidden_PC).clone()
    _check_width(sums, block)
    cos, sin, lengths = _angles(cos_PQ, sin_PQ, frames, len(sums), sums.shape[1] // num_heads)
    _block(block).attention(sums.data_ptr(), cos.data_ptr(), sin.data_ptr(), lengths, num_heads)
    return sums.to(hidden_PC.dtype)


def vision_mlp(hidden_PC: Tensor, block: BlockWeights) -> Tensor:
    sums = plain(hidden_PC).clone()
    _check_width(sums, block)
    _block(block).mlp(sums.data_ptr(), len(sums))
    return sums.to(hidden_PC.dtype)


def vision_blocks(
    hidden_PC: Tensor,
    blocks: Sequence[BlockWeights],
    cos_PQ: Tensor,
    sin_PQ: Tensor,
    frames: Sequence[int],
    num_heads: int,
) -> Tensor:
    sums = plain(hidden_PC).clone()
    _check_width(sums, blocks[0])
    cos, sin, lengths = _angles(cos_PQ, sin_PQ, frames, len(sums), sums.shape[1] // num_heads)
    _tower(blocks, num_heads).run_blocks(sums.data_ptr(), cos.data_ptr(), sin.data_ptr(), lengths)
    return sums.to(hidden_PC.dtype)


class FusedTower:
    """A plain tower from patches to its last norm. Built once of the weights, which it keeps alive.

    `embed` [C, X] has no bias; it and the blocks' matrices are of one form.
    """

    def __init__(
        self, embed: DenseWeight, blocks: Sequence[BlockWeights], norm: Norm, num_heads: int
    ) -> None:
        self.width, self.patch_size = embed.weight.shape
        self.head_dim = self.width // num_heads
        self._native = _tower(blocks, num_heads)
        self._native.set_ends(embed.native, _norm(norm))

    def run(self, patches_PX: Tensor, cos_PQ: Tensor, sin_PQ: Tensor, frames: Sequence[int]) -> Tensor:
        """Normalised patches of all frames, fp32 -> [P, C]; `frames` are lengths."""
        if patches_PX.ndim != 2 or patches_PX.shape[1] != self.patch_size:
            raise KernelError(
                f"patches {tuple(patches_PX.shape)} for a tower of {self.patch_size} values each"
            )
        patches = plain(patches_PX)
        cos, sin, lengths = _angles(cos_PQ, sin_PQ, frames, len(patches), self.head_dim)
        out = torch.empty(len(patches), self.width)
        self._native.run(patches.data_ptr(), cos.data_ptr(), sin.data_ptr(), lengths, out.data_ptr())
        return out


class MergeWeights(NamedTuple):
    """One stage of a resampler. Its matrices have their biases."""

    fc1: DenseWeight
    fc2: DenseWeight
    norm: Norm


class FusedResampler:
    """A plain resampler (`model.resampler`) as one call. Built once of the weights, which it keeps alive.

    Widths within the stages are multiples of 16; `norm` [D] is the weight of the last RMSNorm.
    """

    def __init__(
        self, spatial: MergeWeights, temporal: MergeWeights, project: DenseWeight, norm: Tensor, eps: float
    ) -> None:
        from duomo import _native

        self.block_size, self.width = spatial.fc1.columns, project.rows
        first, second = ((x.fc1.native, x.fc2.native, _norm(x.norm)) for x in (spatial, temporal))
        self._native = _native.DenseResampler(first, second, project.native, plain(norm).numpy(), eps)

    def run(self, blocks_BX: Tensor, earlier: Tensor, later: Tensor) -> Tensor:
        """The tower's rows of neighbouring patches side by side -> features [R, D], fp32.

        Token r is of blocks `earlier[r]` and `later[r]`, int64 [R].
        """
        if blocks_BX.ndim != 2 or blocks_BX.shape[1] != self.block_size:
            raise KernelError(
                f"blocks {tuple(blocks_BX.shape)} for a resampler of {self.block_size} values each"
            )
        blocks = plain(blocks_BX)
        out = torch.empty(len(earlier), self.width)
        self._native.run(blocks.data_ptr(), len(blocks), earlier.numpy(), later.numpy(), out.data_ptr())
        return out


def _angles(
    cos_PQ: Tensor, sin_PQ: Tensor, frames: Sequence[int], patches: int, head_dim: int
) -> tuple[Tensor, Tensor, npt.NDArray[np.int64]]:
    """Angles as the kernels read them, and the frames' lengths."""
    cos, sin = plain(cos_PQ), plain(sin_PQ)
    if not cos.shape == sin.shape == (patches, head_dim // 2):
        raise KernelError(f"angles of {tuple(cos.shape)} for {patches} patches and heads of {head_dim}")
    return cos, sin, _lengths(frames, patches)


def _check_width(sums_PC: Tensor, block: BlockWeights) -> None:
    weight = block.qkv.weight
    if sums_PC.ndim != 2 or sums_PC.shape[1] != weight.columns:
        raise KernelError(f"patches {tuple(sums_PC.shape)} for a matrix of {weight.rows} x {weight.columns}")


def _lengths(frames: Sequence[int], patches: int) -> npt.NDArray[np.int64]:
    if sum(frames) != patches or any(length < 1 for length in frames):
        raise KernelError(f"frames of {list(frames)[:8]} patches do not make up {patches}")
    return np.asarray(frames, np.int64)


def _norm(norm: Norm) -> Any:
    from duomo import _native

    return _native.Norm(plain(norm.weight).numpy(), plain(norm.bias).numpy(), norm.eps)


def _block(block: BlockWeights) -> Any:
    from duomo import _native

    layers = block.qkv, block.out, block.fc1, block.fc2
    native: Any = _native.DenseVisionBlock if _is_plain(block) else _native.VisionBlock
    return native(
        norms=(_norm(block.norm1), _norm(block.norm2)),
        matrices=tuple(layer.weight.native for layer in layers),
        biases=tuple(plain(layer.bias).numpy() for layer in layers),
    )


def _tower(blocks: Sequence[BlockWeights], num_heads: int) -> Any:
    from duomo import _native

    native: Any = _native.DenseTower if _is_plain(blocks[0]) else _native.Tower
    return native(blocks=[_block(block) for block in blocks], num_heads=num_heads)


def _is_plain(block: BlockWeights) -> bool:
    return isinstance(block.qkv.weight, DenseWeight)
