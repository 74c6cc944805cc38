"""ERNIE-4.5, whole: embeddings, decoder, head, and for the multimodal models tower and resampler.

The same class is the 28B, a two-layer test model, the 21B text model and the dense 0.3B: sizes come from
the config. State-dict names are duomo's own; `checkpoints.names` maps every dialect on disk to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duomo import kernels
from duomo.model.attention import PackedCausal
from duomo.model.config import ModelConfig
from duomo.model.decoder import Decoder
from duomo.model.inputs import Batch, KVCache, build_batch
from duomo.model.positions import GridLike, SpanLike
from duomo.model.resampler import Resampler
from duomo.model.vision import VisionTower


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.panels: kernels.DenseWeight | None = None  # of the weights, in service (`model.plain_decoder`)

    def forward(self, ids_T: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.embedding(ids_T, self.weight)
        return self.weight.index_select(0, ids_T)  # the same rows, with fewer questions asked

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        is_wide = hidden_TD.dtype == torch.float32 and not torch.is_grad_enabled()
        return kernels.dense_linear(hidden_TD, self.panels if self.panels and is_wide else self.weight)


class Ernie(nn.Module):
    """Built empty: load a checkpoint into it, or call `init_weights`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        self.head = None if config.tie_embeddings else Embedding(config.vocab_size, config.hidden_size)
        self.vision_tower = VisionTower(config.vision) if config.vision else None
        self.resampler = Resampler(config) if config.vision else None

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Final hidden states [T, D], or [len(logit_rows), D] where the batch asks for some rows only."""
        return self.decoder(self.enter(batch), batch, cache)  # type: ignore[no-any-return]

    def enter(self, batch: Batch) -> Tensor:
        """What goes into the first layer [T, D]: embeddings, and features in the places of media."""
        hidden_TD: Tensor = self.embed(batch.ids_T)
        if batch.feature_rows is not None and batch.features_RD is not None:
            features_RD = batch.features_RD.to(hidden_TD.dtype)
            hidden_TD = hidden_TD.index_copy(0, batch.feature_rows, features_RD)
        return hidden_TD

    def encode(self, patches_PX: Tensor, grids: Sequence[GridLike]) -> Tensor:
        """Normalised patches [P, 588] of pictures and videos, in prompt order -> features [R, D]."""
        assert self.vision_tower is not None and self.resampler is not None, "this model has no vision tower"
        patches_PX = patches_PX.to(self.vision_tower.norm.weight.dtype)
        return self.resampler(self.vision_tower(patches_PX, grids), grids)  # type: ignore[no-any-return]

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, V] of final hidden states."""
        head = self.embed if self.head is None else self.head
        return head.unembed(hidden_TD)

    @torch.inference_mode()
    def logits(
        self, ids: Sequence[int], spans: Sequence[SpanLike] = (), patches_PX: Tensor | None = None
    ) -> Tensor:
        """Logits [T, V] of one prompt, for people who want tensors.

        `spans` say where pictures and videos lie among the ids, `patches_PX` are their patches in order
        (`processing.images.normalize` of `Media.patches`).
        """
        device = self.decoder.norm.weight.device
        features = None
        if patches_PX is not None:
            features = self.encode(patches_PX.to(device), [span.grid for span in spans])
        batch = build_batch([list(ids)], self.config, [spans], features, device=device)
        return self.unembed(self(batch, PackedCausal()))


def init_weights(model: Ernie, seed: int = 0) -> Ernie:
    """Seeded random weights: normals of the config's range, unit norms, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name.rsplit(".", 2)[-2]:
                parameter.fill_(1.0)
            else:
                noise = torch.randn(parameter.shape, generator=generator) * model.config.initializer_range
                parameter.copy_(noise)
    return model
