"""What one forward pass takes: a frozen `Batch`, and the `KVCache` it attends through.

There is no global context: a batch carries ids, positions, the bank of each token and where its keys lie.
Index tensors are made on the CPU while the batch is built, so that no step waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from duomo.model.config import ModelConfig
from duomo.model.positions import SpanLike, build_positions, token_routes


@dataclass(frozen=True, slots=True)
class Batch:
    """`T` new tokens of `S` sequences, packed one sequence after another.

    ids_T            int64, placeholders included
    positions_3T     int64, rows (t, h, w), by Baidu's rule (`model.positions`)
    text_rows        int64 [Tt], the tokens that go to the text experts
    vision_rows      int64 [Tv], the tokens that go to the vision experts; Tt + Tv = T
    num_new          new tokens of each sequence, in order; sums to T
    num_cached       tokens of each sequence already in the cache
    feature_rows     int64 [R], tokens whose embedding is replaced by a row of `features_RD`
    features_RD      picture and video features from `Ernie.encode`
    slots_T          int64, the cache slot of each new token (paged caches)
    page_table_SM    int64, pages of each sequence (paged caches)
    sequence_T       int64, the sequence of each token (paged caches)
    num_keys_T       int64, how many keys each token sees, itself included (paged caches)
    logit_rows       int64, tokens whose logits are wanted, each once; None: all
    mixed_rows       int64, set for the last layer in training: tokens whose MLP or experts are wanted; what
                     the others' add to the residual does not matter. None: all
    expert_ids_LTK   int64 [layers, T, K], written by the pass: the experts each token went to, in the bank of
                     its modality; layers without experts are left alone. None: nobody asks
    """

    ids_T: Tensor
    positions_3T: Tensor
    text_rows: Tensor
    vision_rows: Tensor
    num_new: tuple[int, ...]
    num_cached: tuple[int, ...]
    feature_rows: Tensor | None = None
    features_RD: Tensor | None = None
    slots_T: Tensor | None = None
    page_table_SM: Tensor | None = None
    sequence_T: Tensor | None = None
    num_keys_T: Tensor | None = None
    logit_rows: Tensor | None = None
    mixed_rows: Tensor | None = None
    expert_ids_LTK: Tensor | None = None


class KVCache(Protocol):
    """Where keys and values live. Implemented by the engine (paged) and by `model.attention` (plain)."""

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        """Stores the new keys and values, then attends each token causally within its own sequence.

        Keys are already rotated. Scale is H**-0.5. Returns [T, N, H] in the query's dtype.
        """
        ...


def build_batch(
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    spans: Sequence[Sequence[SpanLike]] = (),
    features_RD: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Batch:
    """Whole prompts packed one after another, nothing cached. The engine builds its own, chunk by chunk."""
    spans = spans or [()] * len(prompts)
    ids = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
    positions = np.concatenate(
        [build_positions(len(prompt), own) for prompt, own in zip(prompts, spans, strict=True)], axis=1
    )
    is_vision = token_routes(ids, config)
    starts = np.cumsum([0, *(len(prompt) for prompt in prompts)])
    media_rows = [
        np.arange(start + span.start, start + span.start + _num_tokens(span))
        for start, own in zip(starts, spans, strict=False)
        for span in own
    ]
    feature_rows = torch.from_numpy(np.concatenate(media_rows)).to(device) if media_rows else None
    return Batch(
        ids_T=torch.from_numpy(ids).to(device),
        positions_3T=torch.from_numpy(positions).to(device),
        text_rows=torch.from_numpy(np.flatnonzero(~is_vision)).to(device),
        vision_rows=torch.from_numpy(np.flatnonzero(is_vision)).to(device),
        num_new=tuple(len(prompt) for prompt in prompts),
        num_cached=(0,) * len(prompts),
        feature_rows=feature_rows,
        features_RD=features_RD,
    )


def _num_tokens(span: SpanLike) -> int:
    grid = span.grid
    return max(1, grid.frames // 2) * (grid.rows // 2) * (grid.columns // 2)
