"""Hidden states through one layer, batch by batch: each sequence whole, nothing cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from duomo.model import Ernie, ModelConfig, PackedCausal
from duomo.model.decoder import DecoderLayer
from duomo.model.rope import decoder_rotation
from duomo.quant.calibration import CalibrationBatch, Recorder


@torch.inference_mode()
def embed_batches(model: Ernie, batches: Sequence[CalibrationBatch]) -> list[Tensor]:
    """What the first layer reads: embeddings, with the features of pictures in their places."""
    states = []
    for item in batches:
        hidden_TD = model.embed(item.batch.ids_T).float()
        if item.batch.feature_rows is not None and item.batch.features_RD is not None:
            hidden_TD = hidden_TD.index_copy(0, item.batch.feature_rows, item.batch.features_RD)
        states.append(hidden_TD)
    return states


@torch.inference_mode()
def walk(
    layer: DecoderLayer,
    config: ModelConfig,
    states: Sequence[Tensor],
    batches: Sequence[CalibrationBatch],
    hear: Callable[[CalibrationBatch], Any],
    recorder: Recorder | None = None,
) -> list[Tensor]:
    """The states after the layer. `hear` is told of each batch just before it runs."""
    after = []
    with recorder or nullcontext():
        for hidden_TD, item in zip(states, batches, strict=True):
            hear(item)
            rotation = decoder_rotation(item.batch.positions_3T, config)
            after.append(layer(hidden_TD, rotation, 0, item.batch, PackedCausal()))
    return after
