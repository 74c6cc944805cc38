"""What each part of the quantizer is worth, on the embedded model: `python -m duomo.bench.ablation`.

Only the routed experts of both modalities are quantized, each variant against the same second moments of the
same prompts; KL to the source is over the text tokens of held-out prompts, with and without pictures. Few
prompts (`--prompts 60`) make every expert a rare one; what that does to each is `duomo.bench.rare`'s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duomo.bench.embedded import EMBEDDED, calibration_prompts, usual
from duomo.bench.methods import Method, ablations, trellis
from duomo.checkpoints import load_model
from duomo.model import Ernie, PackedCausal
from duomo.processing.tokenizer import Tokenizer
from duomo.quant.calibration import BankGrams, CalibrationBatch, Recorder, build_batches
from duomo.quant.judge import compare_logits, summarize
from duomo.quant.layer import bank_hessians
from duomo.tasks import load_handwriting
from duomo.trellis import LCC2_12

Hessians = Callable[[BankGrams, str], list[Tensor]]


def own(grams: BankGrams, part: str) -> list[Tensor]:
    """Every expert by what it heard itself."""
    return [gram.matrix for gram in (grams.gate_up if part == "gate_up" else grams.down)]


@torch.inference_mode()
def logits(model: Ernie, batches: list[CalibrationBatch]) -> list[Tensor]:
    """Of the text tokens of held-out batches."""
    held = [item.batch for item in batches if item.is_held_out]
    return [model.unembed(model(batch, PackedCausal())[batch.text_rows]) for batch in held]


def measure(
    prompts: int, judged: int, damping: float, cache: Path, only: Sequence[str] = ()
) -> dict[str, Any]:
    """A row for each variant, or for those named."""
    model = load_model(EMBEDDED, torch.float32).eval().requires_grad_(False)
    tokenizer, pool = Tokenizer.load(EMBEDDED), load_handwriting(cache, "train")
    fitted = build_batches(model, calibration_prompts(usual(pool), tokenizer, prompts))
    held = build_batches(model, calibration_prompts(usual(pool), tokenizer, judged, seed=12))
    reference = logits(model, held)
    with Recorder(model) as recorder, torch.inference_mode():
        for item in fitted:
            if not item.is_held_out:
                model(item.batch, PackedCausal())
    kept = {name: bank.data.clone() for name, bank in model.named_parameters() if bank.dim() == 3}
    variants: dict[str, tuple[Method, Hessians]] = {
        title: (method, bank_hessians) for title, method in ablations(damping).items()
    }
    variants["L=12, no shrinkage"] = (trellis(LCC2_12, damping), own)
    rows = {}
    for title, (method, hessians) in variants.items():
        if only and title not in only:
            continue
        for name, weights in kept.items():
            home, _, part = name.rpartition(".")
            moments = torch.stack(hessians(recorder.banks[home][0], part))
            model.get_parameter(name).data.copy_(method(weights, moments))
        pairs = [compare_logits(a, b) for a, b in zip(reference, logits(model, held), strict=True)]
        rows[title] = summarize(torch.cat([kl for kl, _ in pairs]), torch.cat([same for _, same in pairs]))
        print(
            f"{title:42s} KL {rows[title]['kl_mean']:.4f} ± {rows[title]['kl_standard_error']:.4f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1200, help="to calibrate on")
    parser.add_argument(
        "--judged", type=int, default=2400, help="prompts drawn to judge on; an eighth is held out"
    )
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--only", nargs="*", default=[], metavar="TITLE", help="these variants alone")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = measure(given.prompts, given.judged, given.damping, given.cache, given.only)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
