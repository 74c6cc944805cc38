"""Grouped-query attention of the decoder, and the two plainest caches it can attend through.

`PackedCausal` keeps nothing: every sequence of the batch is whole, as in training and scoring.
`PlainCache` keeps one growing tensor a layer and sequence; the engine's paged cache replaces it in service.
Attention between the tokens of a picture is causal too: there is no bidirectional mask in this model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.model.config import ModelConfig
from duomo.model.inputs import Batch, KVCache
from duomo.model.layers import Linear
from duomo.model.rope import Rotation


class Attention(nn.Module):
    """N query heads over G key heads; no bias, no norm on q or k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q = Linear(width, config.num_heads * head_dim, config.use_bias)
        self.k = Linear(width, config.num_kv_heads * head_dim, config.use_bias)
        self.v = Linear(width, config.num_kv_heads * head_dim, config.use_bias)
        self.o = Linear(config.num_heads * head_dim, width, config.use_bias)

    def forward(
        self, hidden_TD: Tensor, rotation: Rotation, layer_index: int, batch: Batch, cache: KVCache
    ) -> Tensor:
        heads = (-1, self.head_dim)
        query_TNH = kernels.rotate_pairs(self.q(hidden_TD).unflatten(-1, heads), *rotation)
        key_TGH = kernels.rotate_pairs(self.k(hidden_TD).unflatten(-1, heads), *rotation)
        value_TGH = self.v(hidden_TD).unflatten(-1, heads)
        out_TNH = cache.attend(layer_index, query_TNH, key_TGH, value_TGH, batch)
        return self.o(out_TNH.flatten(-2))  # type: ignore[no-any-return]


class PackedCausal:
    """No storage: each sequence attends within itself. `batch.num_cached` must be all zero."""

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        return kernels.attention_within(query_TNH, key_TGH, value_TGH, batch.num_new)


class PlainCache:
    """Keys and values of `S` sequences, concatenated as they come, in the same order in every batch."""

    def __init__(self) -> None:
        self._store: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        lengths = list(batch.num_new)
        pieces = zip(query_TNH.split(lengths), key_TGH.split(lengths), value_TGH.split(lengths), strict=True)
        return torch.cat(
            [
                kernels.attention(q, *self._append((layer_index, sequence), k, v))
                for sequence, (q, k, v) in enumerate(pieces)
            ]
        )

    def _append(self, place: tuple[int, int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if place in self._store:
            old_key, old_value = self._store[place]
            key, value = torch.cat((old_key, key)), torch.cat((old_value, value))
        self._store[place] = (key, value)
        return key, value
