"""The vision tower: patches of pictures and frames -> one vector a patch.

Patches come in 2x2-block order (spec section 5). Attention is full within one frame and never crosses
frames, so frames of equal size are computed as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.model.config import VisionConfig
from duomo.model.layers import LayerNorm, Linear
from duomo.model.positions import GridLike, Ints
from duomo.model.rope import Rotation, vision_rotation


class VisionTower(nn.Module):
    """Patch embedding, pre-LayerNorm blocks with 2D rotary positions, a last LayerNorm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = Linear(config.patch_size, config.hidden_size)
        self.blocks = VisionBlocks(VisionBlock(config) for _ in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, patches_PX: Tensor, grids: Sequence[GridLike]) -> Tensor:
        """Normalised patches [P, 588] of all media, in order -> [P, C]."""
        rows_P, columns_P = patch_coordinates(grids, self.config.spatial_merge)
        device = patches_PX.device
        rotation = vision_rotation(rows_P.to(device), columns_P.to(device), self.config)
        hidden_PC = self.blocks(self.patch_embed(patches_PX), rotation, frame_lengths(grids))
        return self.norm(hidden_PC)  # type: ignore[no-any-return]


class VisionBlocks(nn.ModuleList):
    """All blocks in turn; `model.packed_vision` has one of the same call over packed weights."""

    def forward(self, hidden_PC: Tensor, rotation: Rotation, frames: Sequence[int]) -> Tensor:
        for block in self:
            hidden_PC = block(hidden_PC, rotation, frames)
        return hidden_PC


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config)
        self.norm2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, has_bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, has_bias=True)

    def forward(self, hidden_PC: Tensor, rotation: Rotation, frames: Sequence[int]) -> Tensor:
        hidden_PC = hidden_PC + self.attention(self.norm1(hidden_PC), rotation, frames)
        return hidden_PC + self.fc2(quick_gelu(self.fc1(self.norm2(hidden_PC))))  # type: ignore[no-any-return]


class VisionAttention(nn.Module):
    """Full attention within each frame; qkv in one matrix, rows q, k, v."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, has_bias=True)
        self.out = Linear(config.hidden_size, config.hidden_size, has_bias=True)

    def forward(self, hidden_PC: Tensor, rotation: Rotation, frames: Sequence[int]) -> Tensor:
        query, key, value = self.qkv(hidden_PC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query = kernels.rotate_halves(query, *rotation)
        key = kernels.rotate_halves(key, *rotation)
        attended = kernels.attention_within(query, key, value, frames, is_causal=False)
        return self.out(attended.flatten(1))  # type: ignore[no-any-return]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def frame_lengths(grids: Sequence[GridLike]) -> list[int]:
    """Patches of each frame of all media."""
    return [grid.rows * grid.columns for grid in grids for _ in range(grid.frames)]


def patch_coordinates(grids: Sequence[GridLike], merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, in 2x2-block order: blocks row-major, and row-major inside a block."""
    rows: list[Ints] = []
    columns: list[Ints] = []
    for grid in grids:
        shape = grid.frames, grid.rows // merge, grid.columns // merge, merge, merge
        row = np.arange(grid.rows).reshape(1, -1, 1, merge, 1)
        column = np.arange(grid.columns).reshape(1, 1, -1, 1, merge)
        rows.append(np.broadcast_to(row, shape).ravel())
        columns.append(np.broadcast_to(column, shape).ravel())
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(columns))
