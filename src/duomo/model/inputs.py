"""What one forward pass takes: a frozen `Batch`, and the `KVCache` it attends through.

There is no global context: a batch carries ids, positions, the bank of each token and where its keys lie.
Index tensors are made on the CPU while the batch is built, so that no step waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    logit_rows       int64, tokens whose logits are wanted; None: all
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
    logit_rows: Tensor | None = None


class KVCache(Protocol):
    """Where keys and values live. Implemented by the engine (paged) and by `model.attention` (plain)."""

    def attend(
        self, layer_index: int, query_TNH: Tensor, key_TGH: Tensor, value_TGH: Tensor, batch: Batch
    ) -> Tensor:
        """Stores the new keys and values, then attends each token causally within its own sequence.

        Keys are already rotated. Scale is H**-0.5. Returns [T, N, H] in the query's dtype.
        """
        ...
