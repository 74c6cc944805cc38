"""What 2 bits cost where: KL of the whole model when one layer's one bank of experts alone is at 2 bits.

The unit that `plan.raise_banks` spends bytes by. One walk through the source, a layer in memory at a time:
beside the original's states walk those of every bank quantized so far, each as if it were the only one, so
that a model of L layers is read once and not L times. No gradients. Worth knowing: banks are quantized here
as they will be, with feedback and a damping of their own; plain rounding would rank them otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duomo.checkpoints.quantized import dequantize
from duomo.checkpoints.stream import CheckpointStream
from duomo.model import Ernie
from duomo.model.decoder import DecoderLayer
from duomo.processing.prompt import Prompt
from duomo.quant.calibration import CalibrationBatch, build_batches
from duomo.quant.judge import judge_logits
from duomo.quant.layer import LayerQuantizer
from duomo.quant.plan import BitPlan
from duomo.quant.walk import embed_batches, walk

Note = Callable[[int], None]


def measure_banks(
    stream: CheckpointStream,
    calibration: Sequence[Prompt],
    plan: BitPlan,
    num_threads: int = 1,
    note: Note = lambda layers_done: None,
) -> dict[str, float]:
    """Mean KL(source || one bank quantized) by bank, "layer.modality", on one held-out batch of each sort."""
    ends = empty_outside(stream)
    batches = build_batches(ends, calibration)
    judged = _one_of_each_sort(batches)
    items = [batches[i] for i in judged]
    states = embed_batches(ends, batches)
    changed: dict[str, list[Tensor]] = {}
    for index, has_experts in enumerate(stream.config.expert_layers):
        layer = DecoderLayer(stream.config, has_experts).requires_grad_(False).eval()
        stream.fill(layer, f"decoder.layers.{index}.")
        quantizer = LayerQuantizer(layer, index, plan, num_threads)
        after = walk(layer, stream.config, states, batches, quantizer.hear, quantizer.recorder)
        for bank, own in changed.items():
            changed[bank] = walk(layer, stream.config, own, items, _deaf)
        if has_experts:
            before = [states[i] for i in judged]
            for modality in ("text", "vision"):
                with _Quantized(quantizer, f"mlp.{modality}.") as names:
                    if names:
                        changed[f"{index}.{modality}"] = walk(layer, stream.config, before, items, _deaf)
        states = after
        del layer, quantizer  # before the next is made: a layer of the 28B is 4 GB, its moments as much again
        note(index + 1)
    original = [states[i] for i in judged]
    return {bank: _mean_kl(ends, original, own, items) for bank, own in changed.items()}


def empty_outside(stream: CheckpointStream) -> Ernie:
    """Everything but the layers, in float32."""
    with torch.device("meta"):
        model = Ernie(stream.config)
    model.decoder.layers = torch.nn.ModuleList()
    model.to_empty(device="cpu")
    return stream.fill(model, "").requires_grad_(False).eval()


class _Quantized:
    """Within it, the parameters of a layer whose names begin with `prefix` are as they would be stored."""

    def __init__(self, quantizer: LayerQuantizer, prefix: str) -> None:
        self._quantizer, self._prefix = quantizer, prefix
        self._kept: dict[str, Tensor] = {}

    def __enter__(self) -> list[str]:
        parameters = dict(self._quantizer.layer.named_parameters())
        stored, _ = self._quantizer.quantize(self._prefix)
        for full, tensor in stored.items():
            name = full.split(".", 3)[3]
            self._kept[name] = parameters[name].data.clone()
            parameters[name].data.copy_(dequantize(tensor))
        return list(self._kept)

    def __exit__(self, *_: object) -> None:
        parameters = dict(self._quantizer.layer.named_parameters())
        for name, kept in self._kept.items():
            parameters[name].data.copy_(kept)


def _deaf(_: CalibrationBatch) -> None:
    """Walks the banks' states without listening."""


def _one_of_each_sort(batches: Sequence[CalibrationBatch]) -> list[int]:
    """The first held-out batch with pictures and the first without."""
    found: dict[bool, int] = {}
    for index, item in enumerate(batches):
        if item.is_held_out:
            found.setdefault(item.has_media, index)
    return sorted(found.values())


def _mean_kl(
    ends: Ernie, original: Sequence[Tensor], changed: Sequence[Tensor], items: Sequence[CalibrationBatch]
) -> float:
    rows = judge_logits(ends, ends, original, changed, items).values()
    return sum(row["kl_mean"] * row["num_tokens"] for row in rows) / sum(row["num_tokens"] for row in rows)
