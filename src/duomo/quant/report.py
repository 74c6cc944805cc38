"""What a quantized checkpoint says of itself: report.json, report.md, and plots where matplotlib is.

Errors are held-out ones: shares of each tensor's output energy on tokens that nothing was fitted to.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from duomo.model import Ernie, ModelConfig
from duomo.quant.plan import BitPlan
from duomo.quant.plots import draw, links

_PARTS = (
    (r"\.text\.(gate_up|down)$", "text experts"),
    (r"\.mlp\.vision\.", "vision experts"),  # with their router: text never reads it
    (r"\.shared\.", "shared experts"),
    (r"\.attention\.[qkvo]\.", "attention"),
    (r"\.mlp\.(gate|up|down)\.", "dense layers"),
    (r"^(embed|head)\.", "embeddings and head"),
    (r"^(vision_tower|resampler)\.", "vision tower and resampler"),
)
NEEDED_FOR_TEXT = (
    "text experts",
    "shared experts",
    "attention",
    "dense layers",
    "embeddings and head",
    "rest",
)


def part_of(name: str) -> str:
    if name.startswith(("vision_tower", "resampler")):
        return "vision tower and resampler"
    return next((part for pattern, part in _PARTS if re.search(pattern, name)), "rest")


def size_by_part(config: ModelConfig, plan: BitPlan) -> dict[str, dict[str, float]]:
    """Weights, bytes and bits a weight of each part, from shapes alone: exact, headers not counted."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Ernie(config).named_parameters()}
    weights: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        weights[part_of(name)] += int(torch.Size(shape).numel())
        sizes[part_of(name)] += plan.num_bytes(name, shape)
    rows = {p: {"weights": weights[p], "bytes": sizes[p], "bits": 8 * sizes[p] / weights[p]} for p in weights}
    text = sum(sizes[p] for p in NEEDED_FOR_TEXT)
    total, every = sum(sizes.values()), sum(weights.values())
    rows["everything"] = {"weights": every, "bytes": total, "bits": 8 * total / every}
    rows["needed for text"] = {
        "weights": sum(weights[p] for p in NEEDED_FOR_TEXT),
        "bytes": text,
        "bits": 0.0,
    }
    rows["needed for text"]["bits"] = 8 * text / rows["needed for text"]["weights"]
    return rows


def write_report(
    target: Path,
    source: Path,
    config: ModelConfig,
    plan: BitPlan,
    pieces: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Mapping[str, float]],
    sensitivities: Mapping[str, float],
    is_calibrated: bool,
) -> dict[str, Any]:
    """Writes report.json, report.md and the plots into `target`; returns what report.json holds."""
    report = {
        "plan": {"name": plan.name, "raised": sorted(plan.raised), "two": plan.two.name},
        "source_bytes": sum(p.stat().st_size for p in source.glob("*.safetensors")),
        "file_bytes": sum(piece["bytes"] for piece in pieces),
        "seconds": round(sum(piece["seconds"] for piece in pieces), 1),
        "parts": size_by_part(config, plan),
        "quality": quality,
        "calibrated": is_calibrated,
        "sensitivities": dict(sensitivities),
        "outside": pieces[0]["tensors"],
        "layers": list(pieces[1:]),
    }
    (target / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plots = draw(report, target)
    (target / "report.md").write_text(_markdown(report, plots), encoding="utf-8")
    return report


def _markdown(report: Mapping[str, Any], plots: Sequence[str]) -> str:
    ratio = report["file_bytes"] / max(report["source_bytes"], 1)
    raised = ", ".join(report["plan"]["raised"])
    lines = [
        "# Quantization report",
        "",
        f"Plan `{report['plan']['name']}`, 2-bit code `{report['plan']['two']}`. "
        f"{report['file_bytes']:,} bytes, {ratio:.3f} of the source, in {report['seconds']:.0f} s."
        + (f" Banks at 4 bits: {raised}." if raised else ""),
        "",
        *_table(
            ("part", "weights", "bytes", "bits a weight"),
            (
                (p, f"{r['weights']:,}", f"{r['bytes']:,}", f"{r['bits']:.4f}")
                for p, r in report["parts"].items()
            ),
        ),
    ]
    if not report["calibrated"]:
        lines += ["No calibration prompts were given: weights were rounded without error feedback.", ""]
    elif not report["quality"]:
        lines += ["A single calibration prompt: none was held out, so nothing here was judged.", ""]
    for modality, row in report["quality"].items():
        lines += [
            f"Held-out {modality}, {row['num_tokens']:,} tokens: KL to the source {row['kl_mean']:.4f} "
            f"± {row['kl_standard_error']:.4f} (median {row['kl_median']:.4f}, 99 % {row['kl_99']:.3f}), "
            f"same likeliest token {100 * row['top1_same']:.1f} ± {100 * row['top1_standard_error']:.1f} %.",
            "",
        ]
    return "\n".join([*lines, *links(plots), *_layers(report), *_tensors(report), *_sensitivities(report)])


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown: the first column to the left, the others to the right."""
    return [
        f"| {' | '.join(titles)} |",
        "| --- |" + " ---: |" * (len(titles) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


_ERRORS = (
    "Errors are shares of the energy of a tensor's outputs, on held-out and on fitted tokens; the last "
    "column is of the weights alone, whatever reads them. "
    "Experts' gate and up are judged on all tokens of their layer."
)


def _layers(report: Mapping[str, Any]) -> list[str]:
    """By layer: what the routers still choose, what each expert heard, how far the states are."""
    rows = []
    for layer in report["layers"]:
        agreement = ", ".join(f"{bank} {100 * share:.1f} %" for bank, share in layer["agreement"].items())
        tokens = ", ".join(
            f"{bank} {min(n)} / {sorted(n)[len(n) // 2]} / {max(n)}"
            for bank, n in layer["tokens"].items()
            if n
        )
        error = "" if layer["hidden_error"] is None else f"{layer['hidden_error']:.4f}"
        rows.append((str(layer["layer"]), agreement, tokens, error))
    titles = ("layer", "experts chosen alike", "tokens an expert: least / median / most", "hidden error")
    return ["## Layers", "", *_table(titles, rows)]


def _tensors(report: Mapping[str, Any]) -> list[str]:
    rows = []
    inside = (tensor for layer in report["layers"] for tensor in layer["tensors"])
    for tensor in (*report["outside"], *inside):
        if tensor["kind"] != "plain":
            numbers = (tensor[key] for key in ("damping", "held_out_error", "fitted_error", "weight_error"))
            cells = ("" if n is None else f"{n:.4g}" for n in numbers)
            rows.append((tensor["name"], tensor["kind"], *cells))
    titles = ("tensor", "kind", "damping", "held-out error", "fitted error", "error of the weights")
    return ["## Tensors", "", _ERRORS, "", *_table(titles, rows)]


def _sensitivities(report: Mapping[str, Any]) -> list[str]:
    """Of an `auto` run: what each bank alone costs at 2 bits, dearest first."""
    costs = sorted(report["sensitivities"].items(), key=lambda item: -item[1])
    if not costs:
        return []
    rows = ((bank, f"{cost:.3g}", "4" if bank in report["plan"]["raised"] else "2") for bank, cost in costs)
    return ["## Sensitivities", "", *_table(("bank", "KL with it alone at 2 bits", "bits"), rows)]
