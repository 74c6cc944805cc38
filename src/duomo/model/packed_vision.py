"""The blocks of a packed vision tower as one call: packed products, attention within frames, fp32 in between.

The blocks stay modules under their own names, so whoever walks over a model finds the packed weights where
the plain ones stood. A tower with anything else than integer matrices and biases keeps the plain blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from duomo import kernels
from duomo.kernels import Affine, BlockWeights, IntWeight, Norm
from duomo.model.layers import LayerNorm
from duomo.model.rope import Rotation
from duomo.model.vision import VisionBlock, VisionBlocks


class PackedVisionBlocks(VisionBlocks):
    """Blocks whose linear maps are packed. While an adapter stands in for one, they run one by one."""

    def forward(self, hidden_PC: Tensor, rotation: Rotation, frames: Sequence[int]) -> Tensor:
        weights = [w for block in self if (w := _weights(block)) is not None]
        if len(weights) < len(self):
            return super().forward(hidden_PC, rotation, frames)
        first = self[0]
        assert isinstance(first, VisionBlock)
        return kernels.vision_blocks(hidden_PC, weights, *rotation, frames, first.attention.num_heads)


def pack(blocks: VisionBlocks) -> VisionBlocks:
    """The same blocks behind one call, or as they were where one cannot be packed."""
    is_packed = len(blocks) > 0 and all(_weights(block) for block in blocks)
    return PackedVisionBlocks(blocks) if is_packed else blocks


def _weights(block: nn.Module) -> BlockWeights | None:
    assert isinstance(block, VisionBlock)
    attention = block.attention
    affine = [_affine(layer) for layer in (attention.qkv, attention.out, block.fc1, block.fc2)]
    if any(layer is None for layer in affine):
        return None
    qkv, out, fc1, fc2 = affine
    return BlockWeights(_norm(block.norm1), qkv, out, _norm(block.norm2), fc1, fc2)  # type: ignore[arg-type]


def _affine(layer: Any) -> Affine | None:
    weight = getattr(layer, "packed", None)
    return Affine(weight, layer.bias) if isinstance(weight, IntWeight) and layer.bias is not None else None


def _norm(norm: LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)
