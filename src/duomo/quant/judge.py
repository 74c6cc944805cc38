"""How far the quantized model stands from its source, on held-out tokens: logits, and choices of experts.

KL(source || quantized) and top-1 agreement are given per modality: `text` prompts without pictures, `picture`
the text tokens of prompts with them. Positions inside a picture are not judged: nobody reads their logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duomo.kernels import Routing
from duomo.model import Ernie
from duomo.model.decoder import DecoderLayer
from duomo.model.experts import Router
from duomo.quant.calibration import CalibrationBatch

CHUNK_TOKENS = 256


class LayerJudge:
    """Compares which experts a layer's routers choose in the two streams, on held-out tokens."""

    def __init__(self, layer: DecoderLayer) -> None:
        self._chosen: dict[str, dict[str, list[Tensor]]] = {}
        self._stream = ""
        for name, part in layer.named_modules():
            if isinstance(part, Router):
                self._chosen[name] = {"original": [], "quantized": []}
                part.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hear(_: nn.Module, __: Any, routing: Routing) -> None:
            if self._stream:
                self._chosen[name][self._stream].append(routing.expert_ids_TK)

        return hear

    def hear_original(self, item: CalibrationBatch) -> None:
        self._stream = "original" if item.is_held_out else ""

    def hear_quantized(self, item: CalibrationBatch) -> None:
        self._stream = "quantized" if item.is_held_out else ""

    def stop(self) -> None:
        self._stream = ""

    def agreement(self) -> dict[str, float]:
        """Share of the K experts of a token that both streams choose, by bank."""
        shares = {}
        for name, streams in self._chosen.items():
            if streams["original"]:
                a, b = torch.cat(streams["original"]), torch.cat(streams["quantized"])
                shares[name.split(".")[-2]] = (a[:, :, None] == b[:, None]).any(-1).float().mean().item()
        return shares


@torch.inference_mode()
def judge_logits(
    source: Ernie,
    quantized: Ernie,
    original_states: Sequence[Tensor],
    quantized_states: Sequence[Tensor],
    batches: Sequence[CalibrationBatch],
) -> dict[str, dict[str, float]]:
    """`summarize` of each modality that has held-out prompts; the models need only their ends."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for before, after, item in zip(original_states, quantized_states, batches, strict=True):
        if item.is_held_out:
            rows = item.batch.text_rows
            own = found.setdefault("picture" if item.has_media else "text", [])
            for part in rows.split(CHUNK_TOKENS):
                ours = quantized.unembed(quantized.decoder.norm(after[part]))
                own.append(compare_logits(source.unembed(source.decoder.norm(before[part])), ours))
    return {
        modality: summarize(torch.cat([kl for kl, _ in own]), torch.cat([same for _, same in own]))
        for modality, own in found.items()
    }


def compare_logits(reference_TV: Tensor, other_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(reference || other) [T] in nats, whether the likeliest token is the same [T])."""
    p, q = reference_TV.double().log_softmax(-1), other_TV.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def summarize(kl_T: Tensor, same_T: Tensor) -> dict[str, float]:
    """Mean with its standard error, quantiles, and top-1 agreement with its own."""
    num, same = kl_T.numel(), same_T.double().mean()
    return {
        "num_tokens": num,
        "kl_mean": kl_T.mean().item(),
        "kl_standard_error": (kl_T.std() / num**0.5).item() if num > 1 else float("nan"),
        "kl_median": kl_T.median().item(),
        "kl_99": kl_T.quantile(0.99).item(),
        "kl_max": kl_T.max().item(),
        "top1_same": same.item(),
        "top1_standard_error": (same * (1 - same) / num).sqrt().item(),
    }
