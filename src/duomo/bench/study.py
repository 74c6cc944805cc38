"""The study's picture and tables from its raw results: `python -m duomo.bench.study`.

Reads `benchmarks/quality-*.json`, as `duomo.bench.quality` and `duomo.bench.ablation` wrote them, draws
`docs/pictures/kl-against-bits.png` and prints the tables of docs/quantization-study.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEERS, OURS, SCALAR, LEFT_OUT = "#c4572e", "#1f5f9e", "#8a6bb1", "#777777"
GROUPS = (
    (lambda title: title.startswith("ggml"), PEERS, "s", "ggml's quantizers, importance matrix"),
    (lambda title: title.startswith("scalar"), SCALAR, "^", "scalar Lloyd-Max, rotation"),
    (lambda title: title.startswith("LCC2"), OURS, "o", "LCC2, L = 10, 12, 14"),
    (lambda title: True, LEFT_OUT, "x", "LCC2 with something left out"),
)


def table(rows: Mapping[str, Any]) -> str:
    """Title, bits where known, KL, the likeliest token kept."""
    lines = ["| | bits a weight | KL, mean | median | 99 % | top-1 kept |", "| --- |" + " ---: |" * 5]
    for title, row in rows.items():
        bits = f"{row['bits']:.3f}" if "bits" in row else ""
        lines.append(
            f"| {title} | {bits} | {row['kl_mean']:.4f} ± {row['kl_standard_error']:.4f} "
            f"| {row['kl_median']:.4f} | {row['kl_99']:.3f} | {100 * row['top1_same']:.1f} % |"
        )
    return "\n".join(lines)


def draw(rows: Mapping[str, Any], path: Path) -> None:
    """KL against bits, one mark a method, KL on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots()
    seen = set()
    for title, row in rows.items():
        _, colour, mark, label = next(group for group in GROUPS if group[0](title))
        axes.errorbar(
            row["bits"],
            row["kl_mean"],
            yerr=row["kl_standard_error"],
            color=colour,
            marker=mark,
            linestyle="none",
            label=None if label in seen else label,
        )
        seen.add(label)
        if colour != OURS:
            name = title.removeprefix("ggml ").removesuffix(" + imatrix")
            name = name.removeprefix("L=12, ").removeprefix("scalar Lloyd-Max, ")
            axes.annotate(name, (row["bits"], row["kl_mean"]), (6, 5), textcoords="offset points", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set(
        yscale="log",
        xlabel="bits a weight",
        ylabel="KL to the source, nats",
        title="SmolLM2-135M, ffn_down alone quantized",
        xlim=(1.95, 2.75),
    )
    axes.set_yticks([0.2, 0.3, 0.5, 1.0], ["0.2", "0.3", "0.5", "1"])
    axes.minorticks_off()
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/kl-against-bits.png"))
    given = parser.parse_args()
    for path in sorted(given.results.glob("quality-*.json")):
        rows = json.loads(path.read_text())
        print(f"\n{path.stem}\n\n{table(rows)}")
        if path.stem == "quality-down":
            draw(rows, given.picture)


if __name__ == "__main__":
    main()
