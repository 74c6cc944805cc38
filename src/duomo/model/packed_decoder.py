"""A packed decoder: trellis-coded layers that are one native call, with the bits of the layers one by one."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from duomo import kernels
from duomo.kernels import BankWeights, FusedDecoder, LayerWeights
from duomo.model.config import ModelConfig
from duomo.model.decoder import Decoder, DecoderLayer
from duomo.model.experts import Experts
from duomo.model.fused_decoder import OneCallDecoder, sizes_of
from duomo.model.inputs import Batch
from duomo.model.packed_layers import PackedAttention, PackedExperts, PackedMLP


class PackedDecoder(OneCallDecoder):
    """`fusible` says whether the layers can be fused at all."""

    def __init__(self, decoder: Decoder, weights: list[LayerWeights]) -> None:
        super().__init__(decoder)
        self._weights = weights
        self._parts = [
            (parent._modules, name, module)
            for parent in self.modules()
            if isinstance(parent, DecoderLayer | Experts)
            for name, module in parent._modules.items()
        ]
        # By number of their layer: asking modules for modules takes half a millisecond of the 28B's step.
        self._banks = [
            (index, layer.mlp.text, layer.mlp.vision)
            for index, layer in enumerate(self.layers)
            if isinstance(layer.mlp, Experts)
        ]

    def _fused_for(self, hidden_TD: Tensor) -> FusedDecoder | None:
        """Every layer must be as it was built: an adapter puts modules of its own there for a pass."""
        is_whole = all(modules.get(name) is module for modules, name, module in self._parts)
        return self._fused if is_whole and hidden_TD.dtype == torch.float32 else None

    @cached_property
    def _fused(self) -> FusedDecoder:
        return FusedDecoder(sizes_of(self.config), self.norm.weight, self._weights)

    def _tell_listeners(self, expert_ids_LTK: Tensor, batch: Batch) -> None:
        has_text, has_pictures = batch.text_rows.numel() > 0, batch.vision_rows.numel() > 0
        last = expert_ids_LTK.shape[0] - 1
        for index, text, vision in self._banks:
            for bank, rows, is_asked in (
                (text, batch.text_rows, has_text),
                (vision, batch.vision_rows, has_pictures),
            ):
                if is_asked and isinstance(bank, PackedExperts) and bank.listener is not None:
                    told_TK = expert_ids_LTK[index]
                    if vision is not None and has_pictures:
                        told_TK = told_TK[rows]
                    bank.listener(told_TK[told_TK[:, 0] >= 0] if index == last else told_TK)


def fusible(decoder: Decoder, config: ModelConfig) -> list[LayerWeights] | None:
    """The weights of every layer, or None where one of them is no trellis matrix or the heads are narrow."""
    if not kernels.is_native or config.head_dim % kernels.HEAD_MULTIPLE:
        return None
    layers = [_layer_weights(layer) for layer in decoder.layers]
    whole = [layer for layer in layers if layer is not None]
    return whole if len(whole) == len(layers) else None


def _layer_weights(layer: torch.nn.Module) -> LayerWeights | None:
    assert isinstance(layer, DecoderLayer)
    norms = (layer.input_norm.weight, layer.post_norm.weight)
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(attention, PackedAttention):
        return None
    own = (*attention.weights, attention.out)
    if isinstance(mlp, PackedMLP):
        return LayerWeights(norms, own, None, None, mlp.weights)
    if not isinstance(mlp, Experts) or not isinstance(mlp.text, PackedExperts):
        return None
    is_vision_packed = mlp.vision is None or isinstance(mlp.vision, PackedExperts)
    if not is_vision_packed or not (mlp.shared is None or isinstance(mlp.shared, PackedMLP)):
        return None
    shared = mlp.shared.weights if isinstance(mlp.shared, PackedMLP) else None
    return LayerWeights(norms, own, _bank_weights(mlp.text), _bank_weights(mlp.vision), shared)


def _bank_weights(bank: torch.nn.Module | None) -> BankWeights | None:
    if not isinstance(bank, PackedExperts):
        return None
    return BankWeights(bank.router.weight, bank.router.bias, bank.gate_up, bank.down)
