"""Samples to tensors: packed rows, positions, the mask between samples and their blocks, media rows.

A batch is a function of (seed, stage, step) alone, so a worker makes it ahead of time and a resumed run sees
the same data. `BlockCache` is the KVCache of training: no storage, one masked attention over [B, L].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from duomo.kernels import attention_within
from duomo.model import Batch, ModelConfig, token_routes
from duomo.model.positions import build_positions
from duomo.processing.patches import normalize
from duomo.processing.prompt import Grid, MediaSpan
from duomo.train.render import IGNORE, Array, Sample

ROW_TOKENS = 192  # of a packed row, unless a sample is longer


class Place(NamedTuple):
    """Where a sample stands in the batch."""

    row: int
    start: int


@dataclass(slots=True)
class TrainingBatch:
    """B rows of L tokens, flattened to T = B*L in the arrays that the model sees."""

    ids_BL: Array
    labels_BL: Array
    block_BL: Array  # -1 in the padding
    sample_BL: Array  # which sample of the batch, -1 in the padding
    positions_3T: Array
    feature_rows: Array
    patches_PX: Array | None  # uint8, equal grids side by side
    grids: list[Grid]
    kinds: list[list[str]]  # of every sample's blocks
    places: list[Place]


def collate(samples: list[Sample], pad_id: int) -> TrainingBatch:
    """Packs samples into rows, first fit, longest first; nothing is cut and no sample sees another."""
    capacity = -(-max(ROW_TOKENS, *(len(sample.ids) for sample in samples)) // 8) * 8
    places = _pack([len(sample.ids) for sample in samples], capacity)
    used = max(p.start + len(s.ids) for p, s in zip(places, samples, strict=True))
    shape = (1 + max(place.row for place in places), -(-used // 8) * 8)
    ids, labels = np.full(shape, pad_id), np.full(shape, IGNORE)
    block, sample_of = np.full(shape, -1), np.full(shape, -1)
    positions = np.zeros((3, *shape), dtype=np.int64)
    for index, (sample, (row, start)) in enumerate(zip(samples, places, strict=True)):
        stretch = slice(start, start + len(sample.ids))
        ids[row, stretch], labels[row, stretch], block[row, stretch] = sample.ids, sample.labels, sample.block
        sample_of[row, stretch] = index
        positions[:, row, stretch] = _positions(sample)
    # Equal grids side by side, so that the tower computes them as one batch.
    seen = [i for i, sample in enumerate(samples) if sample.grid is not None]
    seen.sort(key=lambda i: samples[i].grid or Grid(0, 0, 0))
    feature_rows, patches, grids = [], [], []
    for i in seen:
        grid, rows = samples[i].grid, samples[i].patches
        assert grid is not None and rows is not None
        first = places[i].row * shape[1] + places[i].start + samples[i].media_start
        feature_rows.append(np.arange(first, first + grid.num_tokens))
        patches.append(rows)
        grids.append(grid)
    return TrainingBatch(
        ids,
        labels,
        block,
        sample_of,
        positions.reshape(3, -1),
        np.concatenate(feature_rows) if feature_rows else np.zeros(0, dtype=np.int64),
        np.concatenate(patches) if patches else None,
        grids,
        [sample.kinds for sample in samples],
        places,
    )


def _pack(lengths: list[int], capacity: int) -> list[Place]:
    used: list[int] = []
    places: dict[int, Place] = {}
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, u in enumerate(used) if u + lengths[index] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        places[index] = Place(row, used[row])
        used[row] += lengths[index]
    return [places[index] for index in range(len(lengths))]


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
    """What `Ernie.forward` takes, where the features are; logits only where a label is."""
    ids_T = batch.ids_BL.reshape(-1)
    is_vision = token_routes(ids_T, config)
    device = torch.device("cpu") if features_RD is None else features_RD.device

    def there(array: Array) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        ids_T=there(ids_T),
        positions_3T=there(batch.positions_3T),
        text_rows=there(np.flatnonzero(~is_vision)),
        vision_rows=there(np.flatnonzero(is_vision)),
        num_new=(batch.ids_BL.shape[1],) * batch.ids_BL.shape[0],
        num_cached=(0,) * batch.ids_BL.shape[0],
        feature_rows=there(batch.feature_rows) if features_RD is not None else None,
        features_RD=features_RD,
        logit_rows=there(np.flatnonzero(batch.labels_BL.reshape(-1) != IGNORE)),
    )


def patches_tensor(batch: TrainingBatch) -> Tensor | None:
    return None if batch.patches_PX is None else torch.from_numpy(normalize(batch.patches_PX))


class BlockCache:
    """Causal attention in which a block sees its sample's prefix and itself. Keeps nothing."""

    def __init__(self, batch: TrainingBatch, device: torch.device | str = "cpu") -> None:
        self.blocks_T = torch.from_numpy(batch.block_BL.reshape(-1).astype(np.int32)).to(device)
        # Samples, and the padding at the end of a row, lie one after another.
        sample_T = (batch.sample_BL + np.arange(len(batch.sample_BL))[:, None] * 2**32).reshape(-1)
        ends = np.flatnonzero(np.diff(sample_T)) + 1
        self.lengths = np.diff(ends, prepend=0, append=len(sample_T)).tolist()

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        return attention_within(query_TNH, key_TGH, value_TGH, self.lengths, blocks_T=self.blocks_T)
