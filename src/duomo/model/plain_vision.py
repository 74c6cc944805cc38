"""A plain fp32 tower in service: from patches to its last norm, one native call a picture.

What `model.plain_decoder` is to the decoder: borrowed weights are read where they lie, panels are a copy. The
same modules stand under the same names, and are asked one by one with gradients, below fp32, on another
device, or where something else stands in a module's place. The resampler's products take the same panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.kernels import Affine, BlockWeights, DenseForm, DenseWeight, FusedTower, Norm
from duomo.model.ernie import Ernie
from duomo.model.layers import LayerNorm, Linear
from duomo.model.rope import Rotation
from duomo.model.seen import Seen, is_plain
from duomo.model.vision import VisionAttention, VisionBlock, VisionTower


def fuse_vision(model: Ernie, form: DenseForm) -> None:
    """Gives a plain model a tower that is one call where it can be; any other model stays as it is."""
    tower = model.vision_tower
    if not kernels.is_native or type(tower) is not VisionTower or model.resampler is None:
        return
    config = tower.config
    is_in_lanes = config.intermediate_size % kernels.HEAD_MULTIPLE == 0
    if is_in_lanes and kernels.takes_heads(config.hidden_size // config.num_heads):
        model.vision_tower = PlainTower(tower, form)
    if form is not DenseForm.BORROWED:
        for layer in model.resampler.modules():
            if isinstance(layer, Linear) and is_plain(layer, Linear):
                layer.panels = DenseWeight(layer.weight, layer.bias, form)


class PlainTower(VisionTower):
    def __init__(self, tower: VisionTower, form: DenseForm) -> None:
        nn.Module.__init__(self)
        self.config = tower.config
        self.patch_embed, self.blocks, self.norm = tower.patch_embed, tower.blocks, tower.norm
        self.form = form
        self._fused: FusedTower | None = None
        self._seen: Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies: the native part is made again."""
        return {**self.__dict__, "_fused": None, "_seen": None}

    def embed(self, patches_PX: Tensor, rotation: Rotation, frames: Sequence[int]) -> Tensor:
        fused = self._fused_for(patches_PX)
        if fused is None:
            return super().embed(patches_PX, rotation, frames)
        return fused.run(patches_PX, *rotation, frames)

    def _fused_for(self, patches_PX: Tensor) -> FusedTower | None:
        is_wide = patches_PX.dtype == torch.float32 and patches_PX.device.type == "cpu"
        if torch.is_grad_enabled() or not is_wide:
            return None
        is_copy = self.form is not DenseForm.BORROWED
        if self._seen is not None and self._seen.still_stands():
            return self._fused
        if is_copy and self._fused is not None:
            return None  # an adapter is in: the copy serves again when it has gone
        self._seen, self._fused = Seen(self, has_tensors=not is_copy), self._build()
        return self._fused

    def _build(self) -> FusedTower | None:
        """None where a module is not the plain one."""
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


def _bias(layer: Linear) -> Tensor:
    assert layer.bias is not None, "the tower's blocks have biases"
    return layer.bias


def _norm(norm: LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)
