"""What 2 bits would cost in each expert layer, measured: the unit that `plan.raise_layers` spends bytes by.

Each layer's routed experts are rounded alone, without feedback, and the layer's output on held-out tokens is
compared with the original's. No gradients; one walk through the source.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from duomo.checkpoints.stream import CheckpointStream
from duomo.model import Ernie
from duomo.model.decoder import DecoderLayer
from duomo.processing.prompt import Prompt
from duomo.quant.calibration import build_batches
from duomo.quant.plan import BitPlan
from duomo.quant.walk import embed_batches, walk
from duomo.trellis.encoder import encode_matrix
from duomo.trellis.packing import BLOCK


def measure_layers(
    stream: CheckpointStream, calibration: Sequence[Prompt], plan: BitPlan
) -> dict[int, float]:
    """Squared change of an expert layer's output over its square, by layer."""
    with torch.device("meta"):
        model = Ernie(stream.config)
    model.decoder.layers = torch.nn.ModuleList()
    model.to_empty(device="cpu")
    stream.fill(model, "").eval()
    batches = build_batches(model, calibration)
    states, errors = embed_batches(model, batches), {}
    for index, has_experts in enumerate(stream.config.expert_layers):
        layer = DecoderLayer(stream.config, has_experts).requires_grad_(False).eval()
        stream.fill(layer, f"decoder.layers.{index}.")
        after = walk(layer, stream.config, states, batches, lambda _: None)
        if has_experts:
            _round_banks(layer, plan)
            rounded = walk(layer, stream.config, states, batches, lambda _: None)
            held = [i for i, item in enumerate(batches) if item.is_held_out]
            change = sum((rounded[i] - after[i]).square().sum().item() for i in held)
            errors[index] = change / sum(after[i].square().sum().item() for i in held)
        states = after
    return errors


def _round_banks(layer: DecoderLayer, plan: BitPlan) -> None:
    for parameter in layer.parameters():
        rows, columns = parameter.shape[-2:] if parameter.dim() == 3 else (1, 1)
        if parameter.dim() == 3 and rows % plan.two.row_multiple == 0 and columns % BLOCK == 0:
            for expert in parameter.data:
                expert.copy_(torch.from_numpy(encode_matrix(expert.float().numpy(), plan.two).decode()))
