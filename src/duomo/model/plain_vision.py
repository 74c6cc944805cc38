"""A plain fp32 tower and resampler in service: two native calls a picture.

What `model.plain_decoder` is to the decoder: borrowed weights are read where they lie, panels are a copy. The
same modules stand under the same names, and are asked one by one with gradients, below fp32, on another
device, or where something else stands in a module's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.kernels import (
    Affine,
    BlockWeights,
    DenseForm,
    DenseWeight,
    FusedResampler,
    FusedTower,
    MergeWeights,
    Norm,
)
from duomo.model.ernie import Ernie
from duomo.model.layers import LayerNorm, Linear, RMSNorm
from duomo.model.positions import GridLike
from duomo.model.resampler import Merge, Resampler, frame_pairs
from duomo.model.rope import VisionRotationTable
from duomo.model.seen import Seen, is_plain
from duomo.model.vision import (
    VisionAttention,
    VisionBlock,
    VisionTower,
    frame_lengths,
    patch_coordinates,
)


def fuse_vision(model: Ernie, form: DenseForm) -> None:
    """Gives a plain model a tower and a resampler that are one call where they can be, else leaves them."""
    tower, resampler = model.vision_tower, model.resampler
    if not kernels.is_native or type(tower) is not VisionTower or type(resampler) is not Resampler:
        return
    config = tower.config
    is_in_lanes = config.intermediate_size % kernels.HEAD_MULTIPLE == 0
    if is_in_lanes and kernels.takes_heads(config.hidden_size // config.num_heads):
        model.vision_tower = PlainTower(tower, form)
        model.resampler = PlainResampler(resampler, form)
    if form is not DenseForm.BORROWED:  # for those beside an adapter's, when they are asked one by one
        for layer in resampler.modules():
            if isinstance(layer, Linear) and is_plain(layer, Linear):
                layer.panels = DenseWeight(layer.weight, layer.bias, form)


class _OneCall(nn.Module):
    """The native twin of a part: made when first asked for, and again when what it borrows has changed."""

    form: DenseForm
    _fused: Any = None
    _seen: Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the native part is made again."""
        return {**self.__dict__, "_fused": None, "_seen": None}

    def _fused_for(self, x: Tensor) -> Any:
        """None where the modules must be asked one by one."""
        is_wide = x.dtype == torch.float32 and x.device.type == "cpu"
        if torch.is_grad_enabled() or not is_wide:
            return None
        is_copy = self.form is not DenseForm.BORROWED
        if self._seen is not None and self._seen.still_stands():
            return self._fused
        if is_copy and self._fused is not None:
            return None  # an adapter is in: the copy serves again when it has gone
        self._seen, self._fused = Seen(self, has_tensors=not is_copy), self._build()
        return self._fused

    def _build(self) -> Any:
        """None where a module is not the plain one."""
        raise NotImplementedError


class PlainTower(_OneCall, VisionTower):
    def __init__(self, tower: VisionTower, form: DenseForm) -> None:
        nn.Module.__init__(self)
        self.config = tower.config
        self.patch_embed, self.blocks, self.norm = tower.patch_embed, tower.blocks, tower.norm
        self.form = form
        self._angles = VisionRotationTable(tower.config)

    def forward(self, patches_PX: Tensor, grids: Sequence[GridLike]) -> Tensor:
        fused = self._fused_for(patches_PX)
        if fused is None:
            return super().forward(patches_PX, grids)
        rows_P, columns_P = patch_coordinates(grids, self.config.spatial_merge)
        return fused.run(patches_PX, *self._angles.rotation(rows_P, columns_P), frame_lengths(grids))  # type: ignore[no-any-return]

    def _build(self) -> FusedTower | None:
        blocks = [weights for block in self.blocks if (weights := self._weights(block)) is not None]
        are_ends = is_plain(self.patch_embed, Linear) and is_plain(self.norm, LayerNorm)
        if not blocks or len(blocks) < len(self.blocks) or not are_ends:
            return None
        embed = DenseWeight(self.patch_embed.weight, form=self.form)
        return FusedTower(embed, blocks, _norm(self.norm), self.config.num_heads)

    def _weights(self, block: nn.Module) -> BlockWeights | None:
        if not isinstance(block, VisionBlock) or not is_plain(block.attention, VisionAttention):
            return None
        layers = block.attention.qkv, block.attention.out, block.fc1, block.fc2
        norms = block.norm1, block.norm2
        are_plain = all(is_plain(layer, Linear) for layer in layers)
        if not are_plain or not all(is_plain(norm, LayerNorm) for norm in norms):
            return None
        qkv, out, fc1, fc2 = (Affine(DenseWeight(x.weight, form=self.form), _bias(x)) for x in layers)
        return BlockWeights(_norm(norms[0]), qkv, out, _norm(norms[1]), fc1, fc2)


class PlainResampler(_OneCall, Resampler):
    def __init__(self, resampler: Resampler, form: DenseForm) -> None:
        nn.Module.__init__(self)
        self.block_patches = resampler.block_patches
        self.spatial, self.temporal = resampler.spatial, resampler.temporal
        self.project, self.norm = resampler.project, resampler.norm
        self.form = form

    def forward(self, patches_PC: Tensor, grids: Sequence[GridLike]) -> Tensor:
        fused = self._fused_for(patches_PC)
        if fused is None:
            return super().forward(patches_PC, grids)
        blocks = patches_PC.reshape(-1, patches_PC.shape[-1] * self.block_patches)
        return fused.run(blocks, *frame_pairs(grids, self.block_patches))  # type: ignore[no-any-return]

    def _build(self) -> FusedResampler | None:
        spatial, temporal = _merge(self.spatial, self.form), _merge(self.temporal, self.form)
        are_ends = is_plain(self.project, Linear) and is_plain(self.norm, RMSNorm)
        if spatial is None or temporal is None or not are_ends:
            return None
        return FusedResampler(
            spatial, temporal, _dense(self.project, self.form), self.norm.weight, self.norm.eps
        )


def _merge(merge: nn.Module, form: DenseForm) -> MergeWeights | None:
    if not isinstance(merge, Merge) or not is_plain(merge.norm, LayerNorm):
        return None
    if not is_plain(merge.fc1, Linear) or not is_plain(merge.fc2, Linear):
        return None
    return MergeWeights(_dense(merge.fc1, form), _dense(merge.fc2, form), _norm(merge.norm))


def _dense(layer: Linear, form: DenseForm) -> DenseWeight:
    return layer.panels or DenseWeight(layer.weight, layer.bias, form)


def _bias(layer: Linear) -> Tensor:
    assert layer.bias is not None, "the tower's blocks have biases"
    return layer.bias


def _norm(norm: LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)
