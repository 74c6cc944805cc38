"""A decoder whose step through a paged cache is one native call; any other goes layer by layer.

It holds the same layers under the same names. What it computes has the same bits either way where matrices
are packed (`packed_decoder`), and nearly the same numbers where they are plain (`plain_decoder`). A fact
easily missed: the fused call asks no module, so hooks see only the steps that it does not take.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from duomo.kernels import DecoderSizes, FusedDecoder, PackedStep
from duomo.model.config import ModelConfig
from duomo.model.decoder import Decoder
from duomo.model.inputs import Batch, KVCache
from duomo.model.rope import RotationTable


class PagedKV(Protocol):
    """A cache whose pages the native decoder writes: `store` [2, layers, slots, G, H], `scale` without H."""

    store: Tensor
    scale: Tensor | None
    page_size: int


def _as_paged(cache: KVCache) -> PagedKV | None:
    """By its page size: asking a Protocol for all it has takes a twentieth of a small model's step."""
    return cast(PagedKV, cache) if hasattr(cache, "page_size") else None


class OneCallDecoder(Decoder):
    """`decoder`'s layers and norm. Who inherits says when they are one call, and hears what was chosen."""

    def __init__(self, decoder: Decoder) -> None:
        torch.nn.Module.__init__(self)
        self.plain = (decoder,)  # in a tuple, which torch does not count among the submodules
        self.config, self.layers, self.norm = decoder.config, decoder.layers, decoder.norm
        self._angles = RotationTable(decoder.config)

    def _fused_for(self, hidden_TD: Tensor) -> FusedDecoder | None:
        """The native decoder, or None where the layers must be asked one by one."""
        raise NotImplementedError

    def _tell_listeners(self, expert_ids_LTK: Tensor, batch: Batch) -> None:
        """After a native step; -1 are the experts of a token that went to none."""

    def forward(self, hidden_TD: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        pages, sequence_T, num_keys_T = batch.page_table_SM, batch.sequence_T, batch.num_keys_T
        paged, slots_T = _as_paged(cache), batch.slots_T
        fused = self._fused_for(hidden_TD) if paged is not None and slots_T is not None else None
        if fused is None or pages is None or sequence_T is None or num_keys_T is None:
            return super().forward(hidden_TD, batch, cache)
        assert paged is not None and slots_T is not None
        step = PackedStep(
            *self._angles.rotation(batch.positions_3T),
            paged.store,
            paged.scale,
            paged.page_size,
            slots_T,
            pages,
            sequence_T,
            num_keys_T,
            batch.text_rows,
            batch.vision_rows,
        )
        expert_ids_LTK, rows = batch.expert_ids_LTK, batch.logit_rows
        if expert_ids_LTK is not None:  # somebody looks at every token's experts, of the last layer too
            out_TD = fused.run(hidden_TD, step, expert_ids_LTK)
            out_TD = out_TD if rows is None else out_TD[rows]
        else:
            shape = (fused.num_layers, hidden_TD.shape[0], fused.sizes.chosen)
            expert_ids_LTK = torch.full(shape, -1)
            out_TD = fused.run(hidden_TD, step._replace(wanted_rows=rows), expert_ids_LTK)
        self._tell_listeners(expert_ids_LTK, batch)
        return out_TD


def sizes_of(config: ModelConfig) -> DecoderSizes:
    return DecoderSizes(
        width=config.hidden_size,
        num_heads=config.num_heads,
        groups=config.num_kv_heads,
        head_dim=config.head_dim,
        chosen=config.num_chosen if config.text_experts else 1,
        eps=config.norm_eps,
        norm_min=config.router_norm_min,
    )
