"""Scales and gains of a quantized layer tuned against the original's output, which codes alone cannot follow.

What moves: one factor for every stored row scale, and the gains of the layer's two norms. Codes stay. What
is asked for: that the layer, reading what the quantized model really gives it, says what the original said;
each token's error counts by its share of that token's energy, since norms see no other. Adam, on the fitted
tokens; the best state on held-out tokens is kept, and the start competes: those cannot become worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from duomo.checkpoints.quantized import Stored, dequantize
from duomo.model import Batch, ModelConfig, PackedCausal
from duomo.model.decoder import DecoderLayer
from duomo.model.rope import decoder_rotation
from duomo.quant.calibration import CalibrationBatch
from duomo.trellis import TrellisBank, TrellisTensor

EPOCHS, RATE = 4, 2e-3


class Tuner:
    """The trainable factors of one layer whose parameters hold the decoded weights."""

    def __init__(self, layer: DecoderLayer, config: ModelConfig, stored: Mapping[str, Stored]) -> None:
        self.layer, self.config = layer, config
        self.stored = {
            name.split(".", 3)[3]: own
            for name, own in stored.items()
            if isinstance(own, (TrellisTensor, TrellisBank))
        }
        self.base = {name: own.detach() for name, own in layer.named_parameters()}
        self.factors = {
            name: torch.ones(own.row_scale.shape, requires_grad=True) for name, own in self.stored.items()
        }
        self.gains = {
            name: own.clone().requires_grad_() for name, own in self.base.items() if "_norm." in name
        }

    def error(self, hidden_TD: Tensor, wanted_TD: Tensor, item: CalibrationBatch) -> Tensor:
        """Mean over tokens of |layer(hidden) - wanted|^2 / |wanted|^2."""
        scaled = {name: self.base[name] * factor[..., None] for name, factor in self.factors.items()}
        rotation = decoder_rotation(item.batch.positions_3T, self.config)
        arguments = (hidden_TD, rotation, 0, item.batch, PackedCausal())
        said_TD = functional_call(self.layer, scaled | self.gains, arguments)
        energy_T = wanted_TD.square().sum(-1).clamp(min=1e-12)
        shares_T: Tensor = (said_TD - wanted_TD).square().sum(-1) / energy_T
        return shares_T.mean()

    def parameters(self) -> list[Tensor]:
        return [*self.factors.values(), *self.gains.values()]


def tune(
    layer: DecoderLayer,
    config: ModelConfig,
    stored: Mapping[str, Stored],
    hidden: Sequence[Tensor],
    wanted: Sequence[Tensor],
    batches: Sequence[CalibrationBatch],
) -> tuple[dict[str, Stored], float, float]:
    """(what to store instead, held-out error before and after). `layer` takes the tuned values too."""
    tuner = Tuner(layer, config, stored)
    fitted = [i for i, item in enumerate(batches) if not item.is_held_out]
    held = [i for i, item in enumerate(batches) if item.is_held_out] or fitted
    hidden, wanted = [h.clone() for h in hidden], [w.clone() for w in wanted]  # out of inference mode
    batches = [replace(item, batch=_trainable(item.batch)) for item in batches]

    def judged() -> float:
        with torch.no_grad():
            return sum(tuner.error(hidden[i], wanted[i], batches[i]).item() for i in held) / len(held)

    first = judged()
    best, best_state = first, [p.detach().clone() for p in tuner.parameters()]
    optimizer = torch.optim.Adam(tuner.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(fitted))
    for _ in range(EPOCHS):
        for index in fitted:
            optimizer.zero_grad()
            tuner.error(hidden[index], wanted[index], batches[index]).backward()
            optimizer.step()
            schedule.step()
        if (found := judged()) < best:
            best, best_state = found, [p.detach().clone() for p in tuner.parameters()]
    with torch.no_grad():
        for parameter, value in zip(tuner.parameters(), best_state, strict=True):
            parameter.copy_(value)
    return _fold(tuner, stored), first, best


def _trainable(batch: Batch) -> Batch:
    """The same batch, its tensors fit for autograd."""
    tensors: dict[str, Any] = {
        f.name: own.clone() for f in fields(batch) if isinstance(own := getattr(batch, f.name), Tensor)
    }
    return replace(batch, **tensors)


def _fold(tuner: Tuner, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Factors into the row scales, gains into the norms; the layer's parameters follow."""
    folded, parameters = dict(stored), dict(tuner.layer.named_parameters())
    for full in stored:
        name = full.split(".", 3)[3]
        own = tuner.stored.get(name)
        if own is not None:
            scale = own.row_scale.astype(np.float32) * tuner.factors[name].detach().numpy()
            folded[full] = replace(own, row_scale=scale.astype(np.float16))
        elif name in tuner.gains:
            folded[full] = tuner.gains[name].detach().clone()
        else:
            continue
        parameters[name].data.copy_(dequantize(folded[full]))
    return folded
