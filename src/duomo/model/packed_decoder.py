"""A packed decoder: a step through a paged cache is one native call, any other goes layer by layer.

It holds the same layers under the same names, and what it computes has the same bits either way. A fact
easily missed: the fused call asks no module, so hooks see only the steps that it does not take.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from duomo import kernels
from duomo.kernels import BankWeights, DecoderSizes, FusedDecoder, LayerWeights, PackedStep
from duomo.model.config import ModelConfig
from duomo.model.decoder import Decoder, DecoderLayer
from duomo.model.experts import Experts
from duomo.model.inputs import Batch, KVCache
from duomo.model.packed_layers import PackedAttention, PackedExperts, PackedMLP
from duomo.model.rope import decoder_rotation


@runtime_checkable
class PagedKV(Protocol):
    """A cache whose pages the native decoder writes: `store` [2, layers, slots, G, H], `scale` without H."""

    store: Tensor
    scale: Tensor | None
    page_size: int


class PackedDecoder(Decoder):
    """`decoder`'s layers and norm. `weights_of` says whether they can be fused at all."""

    def __init__(self, decoder: Decoder, weights: list[LayerWeights]) -> None:
        torch.nn.Module.__init__(self)
        self.plain = (decoder,)  # in a tuple, which torch does not count among the submodules
        self.config, self.layers, self.norm = decoder.config, decoder.layers, decoder.norm
        self._weights = weights
        self._parts = [
            (parent._modules, name, module)
            for parent in self.modules()
            if isinstance(parent, DecoderLayer | Experts)
            for name, module in parent._modules.items()
        ]

    def _can_fuse(self, hidden_TD: Tensor) -> bool:
        """Whether every layer is as it was built: an adapter puts modules of its own there for a pass."""
        is_whole = all(modules.get(name) is module for modules, name, module in self._parts)
        return is_whole and hidden_TD.dtype == torch.float32

    @cached_property
    def _fused(self) -> FusedDecoder:
        config = self.config
        sizes = DecoderSizes(
            width=config.hidden_size,
            num_heads=config.num_heads,
            groups=config.num_kv_heads,
            head_dim=config.head_dim,
            chosen=config.num_chosen if config.text_experts else 1,
            eps=config.norm_eps,
            norm_min=config.router_norm_min,
        )
        return FusedDecoder(sizes, self.norm.weight, self._weights)

    def forward(self, hidden_TD: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        pages, sequence_T, num_keys_T = batch.page_table_SM, batch.sequence_T, batch.num_keys_T
        is_paged = isinstance(cache, PagedKV) and batch.slots_T is not None and pages is not None
        if not is_paged or sequence_T is None or num_keys_T is None or not self._can_fuse(hidden_TD):
            return super().forward(hidden_TD, batch, cache)
        assert isinstance(cache, PagedKV) and batch.slots_T is not None and pages is not None
        step = PackedStep(
            *decoder_rotation(batch.positions_3T, self.config),
            cache.store,
            cache.scale,
            cache.page_size,
            batch.slots_T,
            pages,
            sequence_T,
            num_keys_T,
            batch.text_rows,
            batch.vision_rows,
        )
        expert_ids_LTK = batch.expert_ids_LTK
        if expert_ids_LTK is None:
            shape = (len(self.layers), hidden_TD.shape[0], self._fused.sizes.chosen)
            expert_ids_LTK = torch.empty(shape, dtype=torch.int64)
        out_TD = self._fused.run(hidden_TD, step, expert_ids_LTK)
        self._tell_listeners(expert_ids_LTK, batch)
        return out_TD

    def _tell_listeners(self, expert_ids_LTK: Tensor, batch: Batch) -> None:
        for layer, chosen_TK in zip(self.layers, expert_ids_LTK, strict=True):
            if not isinstance(layer.mlp, Experts):
                continue
            is_single = layer.mlp.vision is None or not batch.vision_rows.numel()
            for bank, rows in ((layer.mlp.text, batch.text_rows), (layer.mlp.vision, batch.vision_rows)):
                if isinstance(bank, PackedExperts) and bank.listener is not None and rows.numel():
                    bank.listener(chosen_TK if is_single else chosen_TK[rows])


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
