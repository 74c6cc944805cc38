"""Samples to tensors: rows padded to one length, positions, the mask between blocks, media rows.

A batch is a function of (seed, stage, step) alone, so a worker makes it ahead of time and a resumed run sees
the same data. `BlockCache` is the KVCache of training: no storage, one masked attention over [B, L].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.model import Batch, ModelConfig, token_routes
from duomo.model.positions import build_positions
from duomo.processing.patches import normalize
from duomo.processing.prompt import Grid, MediaSpan
from duomo.train.render import IGNORE, Array, Sample


@dataclass(slots=True)
class TrainingBatch:
    """B rows of L tokens, flattened to T = B*L in the arrays that the model sees."""

    ids_BL: Array
    labels_BL: Array
    block_BL: Array  # -1 in the padding
    positions_3T: Array
    feature_rows: Array
    patches_PX: Array | None  # uint8
    grids: list[Grid]
    kinds: list[list[str]]


def collate(samples: list[Sample], pad_id: int) -> TrainingBatch:
    length = -(-max(len(sample.ids) for sample in samples) // 8) * 8
    shape = (len(samples), length)
    ids, labels, block = np.full(shape, pad_id), np.full(shape, IGNORE), np.full(shape, -1)
    positions = np.zeros((3, *shape), dtype=np.int64)
    feature_rows = []
    for row, sample in enumerate(samples):
        count = len(sample.ids)
        ids[row, :count], labels[row, :count], block[row, :count] = sample.ids, sample.labels, sample.block
        positions[:, row, :count] = _positions(sample)
        if sample.grid is not None:
            start = row * length + sample.media_start
            feature_rows.append(np.arange(start, start + sample.grid.num_tokens))
    patches = [sample.patches for sample in samples if sample.patches is not None]
    return TrainingBatch(
        ids,
        labels,
        block,
        positions.reshape(3, -1),
        np.concatenate(feature_rows) if feature_rows else np.zeros(0, dtype=np.int64),
        np.concatenate(patches) if patches else None,
        [sample.grid for sample in samples if sample.grid is not None],
        [sample.kinds for sample in samples],
    )


def _positions(sample: Sample) -> Array:
    """The prefix by Baidu's rule; every block goes on where the prefix ends."""
    block = np.array(sample.block)
    prefix = int((block == 0).sum())
    spans = [MediaSpan(sample.media_start, sample.grid)] if sample.grid is not None else []
    head = build_positions(prefix, spans)
    after = int(head.max()) + 1 if prefix else 0
    tails = [np.broadcast_to(np.arange(n) + after, (3, n)) for n in np.bincount(block)[1:]]
    return np.concatenate([head, *tails], axis=1)


def model_batch(batch: TrainingBatch, config: ModelConfig, features_RD: Tensor | None) -> Batch:
    """What `Ernie.forward` takes; logits only where a label is."""
    ids_T = batch.ids_BL.reshape(-1)
    is_vision = token_routes(ids_T, config)
    return Batch(
        ids_T=torch.from_numpy(ids_T),
        positions_3T=torch.from_numpy(batch.positions_3T),
        text_rows=torch.from_numpy(np.flatnonzero(~is_vision)),
        vision_rows=torch.from_numpy(np.flatnonzero(is_vision)),
        num_new=(batch.ids_BL.shape[1],) * batch.ids_BL.shape[0],
        num_cached=(0,) * batch.ids_BL.shape[0],
        feature_rows=torch.from_numpy(batch.feature_rows) if features_RD is not None else None,
        features_RD=features_RD,
        logit_rows=torch.from_numpy(np.flatnonzero(batch.labels_BL.reshape(-1) != IGNORE)),
    )


def patches_tensor(batch: TrainingBatch) -> Tensor | None:
    return None if batch.patches_PX is None else torch.from_numpy(normalize(batch.patches_PX))


class BlockCache:
    """Causal attention in which a block sees the prefix and itself. Keeps nothing."""

    def __init__(self, block_BL: Array) -> None:
        block = torch.from_numpy(block_BL)
        self.shape = tuple(block.shape)
        query, key = block[:, :, None], block[:, None, :]
        causal = torch.ones(block.shape[1], block.shape[1], dtype=torch.bool).tril()
        self.mask_B1LL = (((key == 0) | (key == query)) & causal)[:, None]

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        query, key, value = (
            x.unflatten(0, self.shape).transpose(1, 2) for x in (query_TNH, key_TGH, value_TGH)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask_B1LL, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)
