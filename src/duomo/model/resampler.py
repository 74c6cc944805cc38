"""The resampler: 2x2 patches, and pairs of frames, into one vector of the language model's width.

A picture has no second frame, so it is paired with itself (spec section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duomo.model.config import ModelConfig
from duomo.model.layers import LayerNorm, Linear, RMSNorm
from duomo.model.positions import GridLike


class Merge(nn.Module):
    """Linear, GELU, Linear, LayerNorm over concatenated neighbours."""

    def __init__(self, in_size: int, out_size: int, norm_eps: float) -> None:
        super().__init__()
        self.fc1 = Linear(in_size, out_size, has_bias=True)
        self.fc2 = Linear(out_size, out_size, has_bias=True)
        self.norm = LayerNorm(out_size, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc2(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class Resampler(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vision is not None, "a resampler needs a vision tower"
        vision = config.vision
        self.block_patches = vision.spatial_merge**2
        spatial = vision.hidden_size * self.block_patches
        self.spatial = Merge(spatial, spatial, vision.norm_eps)
        self.temporal = Merge(spatial * vision.temporal_merge, spatial, vision.norm_eps)
        self.project = Linear(spatial, config.hidden_size, has_bias=True)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, patches_PC: Tensor, grids: Sequence[GridLike]) -> Tensor:
        """Tower outputs [P, C] of all media -> features [R, D], R = the media's tokens."""
        blocks = self.spatial(patches_PC.reshape(-1, patches_PC.shape[-1] * self.block_patches))
        first, second = (index.to(blocks.device) for index in frame_pairs(grids, self.block_patches))
        pairs = self.temporal(torch.cat((blocks[first], blocks[second]), dim=-1))
        return self.norm(self.project(pairs))  # type: ignore[no-any-return]


def frame_pairs(grids: Sequence[GridLike], block_patches: int) -> tuple[Tensor, Tensor]:
    """Rows of the earlier and of the later frame of every pair."""
    first, second, start = [], [], 0
    for grid in grids:
        blocks = grid.rows * grid.columns // block_patches
        frames = torch.arange(start, start + grid.frames * blocks).unflatten(0, (grid.frames, blocks))
        assert grid.frames == 1 or grid.frames % 2 == 0, (
            f"a video needs an even number of frames, not {grid.frames}"
        )
        first.append(frames[0::2].flatten())
        second.append(frames[min(1, grid.frames - 1) :: 2].flatten())
        start += grid.frames * blocks
    return torch.cat(first), torch.cat(second)
