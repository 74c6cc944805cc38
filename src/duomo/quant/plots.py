"""The pictures of a quantization report, where matplotlib is installed; without it there are none.

Four of them: bytes by part, held-out error by layer, experts chosen alike by layer, tokens heard by experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Curves = Mapping[str, list[tuple[int, float]]]
COLOURS = {
    "text": "#1f5f9e", "vision": "#c4572e", "shared": "#4a8c3f", "attention": "#8a6bb1", "dense": "#777777",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.")


def draw(report: Mapping[str, Any], target: Path) -> list[str]:
    """Writes the pictures into `target`; their file names, in the order of reading."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    names = []
    for name, height, fill in (
        ("report-bytes.png", 3.4, _bytes),
        ("report-errors.png", 4.4, _errors),
        ("report-agreement.png", 3.4, _agreement),
        ("report-tokens.png", 3.4, _tokens),
    ):
        figure = Figure(figsize=(8.4, height), layout="constrained")
        axes = figure.subplots()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if fill(axes, report):
            figure.savefig(target / name, dpi=120)
            names.append(name)
    return names


def _bytes(axes: Any, report: Mapping[str, Any]) -> bool:
    parts = {p: r for p, r in report["parts"].items() if p not in ("everything", "needed for text")}
    order = sorted(parts, key=lambda part: parts[part]["bytes"])
    sizes = [parts[part]["bytes"] / 1e6 for part in order]
    bars = axes.barh(order, sizes, color=COLOURS["text"])
    labels = [
        f" {size:,.2f} MB, {parts[part]['bits']:.2f} bits" for part, size in zip(order, sizes, strict=True)
    ]
    axes.bar_label(bars, labels, fontsize=8)
    axes.set(xlabel="MB", title="Bytes by part, and bits a weight", xlim=(0, 1.3 * max(sizes)))
    return True


def _errors(axes: Any, report: Mapping[str, Any]) -> bool:
    curves = defaultdict(list)
    for layer in report["layers"]:
        for tensor in layer["tensors"]:
            if tensor["held_out_error"] is not None:
                curves[_short(tensor["name"])].append((layer["layer"], tensor["held_out_error"]))
    axes.set(yscale="log", title="Held-out error: share of a tensor's output energy that is lost")
    return _curves(axes, curves)


def _agreement(axes: Any, report: Mapping[str, Any]) -> bool:
    curves = defaultdict(list)
    for layer in report["layers"]:
        for bank, share in layer["agreement"].items():
            curves[bank].append((layer["layer"], 100 * share))
    axes.set(title="Experts that source and quantized model both choose", ylabel="%")
    return _curves(axes, curves)


def _tokens(axes: Any, report: Mapping[str, Any]) -> bool:
    """Every expert a dot, the median a line: rare experts are the ones to worry about."""
    medians = defaultdict(list)
    for layer in report["layers"]:
        for bank, counts in layer["tokens"].items():
            if counts:
                colour = COLOURS.get(bank, "#777777")
                # On a logarithmic axis no token at all stands at one half.
                axes.plot([layer["layer"]] * len(counts), [max(n, 0.5) for n in counts], ".", color=colour,
                          alpha=0.35, markersize=4)  # fmt: skip
                medians[bank].append((layer["layer"], max(sorted(counts)[len(counts) // 2], 0.5)))
    axes.set(yscale="log", title="Calibration tokens that chose each expert, and their median")
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis(lambda count, _: f"{count:,.0f}")
    return _curves(axes, medians)


def _curves(axes: Any, curves: Curves) -> bool:
    if not curves:
        return False
    seen: dict[str, int] = defaultdict(int)
    for label, points in curves.items():
        family = next((word for word in COLOURS if label.startswith(word)), "")
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=3,
            linewidth=1.2,
            color=COLOURS.get(family, "#777777"),
            linestyle=STYLES[seen[family] % len(STYLES)],
            label=label,
        )
        seen[family] += 1
    layers = sorted({layer for points in curves.values() for layer, _ in points})
    axes.set(xlabel="decoder layer")
    axes.set_xticks(layers if len(layers) <= 15 else layers[:: len(layers) // 10])
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return True


def _short(name: str) -> str:
    """decoder.layers.3.mlp.text.gate_up -> text gate and up; decoder.layers.0.mlp.up.weight -> dense up."""
    words = name.removesuffix(".weight").replace("gate_up", "gate and up").split(".")[3:]
    if words[0] == "mlp":
        words = words[1:] if len(words) > 2 else ["dense", words[1]]
    return " ".join(words)


def links(names: Iterable[str]) -> list[str]:
    """Markdown that shows them."""
    return [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})\n" for name in names]
