"""report.html: one file without scripts or addresses, rewritten while a run goes on and reloading itself.

Curves of loss, accuracy, speed and the routers' terms, the data's statistics, and expert usage as one strip
of cells a layer and modality: a cell is as dark as its expert is used, and a collapsed layer is seen at once.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH, _HEIGHT, _PAD = 420, 150, 54
_STYLE = """
body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:900px;padding:0 1em;color:#1a2330;
background:#fff}
h1{font-size:1.4em}h2{font-size:1.05em;margin:1.6em 0 .4em}.grid{display:flex;flex-wrap:wrap;gap:12px}
figure{margin:0}figcaption{font-size:.85em;color:#5a6675}svg text{font:10px system-ui,sans-serif;fill:#5a6675}
table{border-collapse:collapse}td,th{text-align:left;padding:.15em .8em .15em 0;vertical-align:top}
.big{font-size:1.6em;font-weight:600}.facts{display:flex;gap:2.2em;margin:.8em 0}.facts div{line-height:1.2}
.facts small{color:#5a6675;display:block}
"""


def write_report(
    path: Path, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], is_over: bool
) -> None:
    """Replaces the page whole, so that a browser never reads half of it."""
    partial = path.with_suffix(".partial")
    partial.write_text(render(facts, rows, is_over), encoding="utf-8")
    os.replace(partial, path)


def render(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], is_over: bool) -> str:
    refresh = "" if is_over else '<meta http-equiv="refresh" content="5">'
    title = f"{facts.get('stage', '')} of {facts.get('model', '')}"
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8">{refresh}<title>{_text(title)}</title>',
        f"<style>{_STYLE}</style><h1>{_text(title)}{'' if is_over else ' · running'}</h1>",
        _headline(facts, rows, is_over),
        f'<h2>Curves</h2><div class="grid">{_curves(rows)}</div>',
        _experts(rows),
        _facts(facts),
        "</html>",
    ]
    return "\n".join(parts)


def _headline(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], is_over: bool) -> str:
    if not rows:
        return "<p>No step is done yet.</p>"
    last = rows[-1]
    found = [("step", f"{last['step']} of {facts.get('steps', '?')}"), ("loss", f"{last['loss']:.4f}")]
    if last["accuracy"] is not None:
        found.append(("right", f"{100 * last['accuracy']:.1f} %"))
    judged = [row["evaluation"] for row in rows if "evaluation" in row]
    if judged:
        found.append(("unseen answers right", f"{100 * judged[-1]['answers_right']:.1f} %"))
    found.append(("tokens/s", f"{last['tokens_per_s']:,.0f}"))
    if not is_over:
        found.append(("left", f"{last['seconds_left']:,.0f} s"))
    cells = "".join(f'<div><small>{n}</small><span class="big">{_text(v)}</span></div>' for n, v in found)
    return f'<div class="facts">{cells}</div>'


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    steps = [row["step"] for row in rows]
    series: dict[str, list[tuple[float, float]]] = {"loss": [], "accuracy": [], "tokens/s": [], "rate": []}
    for row, step in zip(rows, steps, strict=True):
        series["loss"].append((step, row["loss"]))
        if row["accuracy"] is not None:
            series["accuracy"].append((step, row["accuracy"]))
        series["tokens/s"].append((step, row["tokens_per_s"]))
        series["rate"].append((step, row["rate"]))
        for name, value in row["values"].items():
            series.setdefault(name, []).append((step, value))
        for name, value in row.get("evaluation", {}).items():
            if name in ("loss", "answers_right"):
                series.setdefault(f"unseen {name.replace('_', ' ')}", []).append((step, value))
    return "".join(_curve(name, points) for name, points in series.items() if points)


def _curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    span, width = (high - low) or 1.0, (max(xs) - min(xs)) or 1.0

    def place(x: float, y: float) -> str:
        across = _PAD + (x - min(xs)) / width * (_WIDTH - _PAD - 8)
        down = _HEIGHT - 18 - (y - low) / span * (_HEIGHT - 30)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(place(x, y) for x, y in points)
    across, down = place(*points[-1]).split(",")
    dot = f'<circle cx="{across}" cy="{down}" r="2.5" fill="#0b6bcb"/>'
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{_text(name)}">'
        f'<rect x="{_PAD}" y="8" width="{_WIDTH - _PAD - 8}" height="{_HEIGHT - 24}" fill="#f4f7fa"/>'
        f'<polyline points="{line}" fill="none" stroke="#0b6bcb" stroke-width="1.6"/>{dot}'
        f'<text x="2" y="16">{high:.3g}</text><text x="2" y="{_HEIGHT - 18}">{low:.3g}</text>'
        f'<text x="{_PAD}" y="{_HEIGHT - 4}">{min(xs):.0f}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 4}" text-anchor="end">{max(xs):.0f}</text></svg>'
        f"<figcaption>{_text(name)}: {ys[-1]:.4g}</figcaption></figure>"
    )


def _experts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last usage of each modality: a row a layer, a cell an expert."""
    parts = []
    for modality in ("text", "vision"):
        used = [row["usage"][modality] for row in rows if any(map(any, row["usage"].get(modality, [])))]
        if not used:
            continue
        layers, size = used[-1], 16
        cells = []
        for row, shares in enumerate(layers):
            even = 1 / len(shares)
            cells.append(f'<text x="0" y="{row * size + 11}">{row}</text>')
            for expert, share in enumerate(shares):
                dark = min(1.0, share / (3 * even))
                cells.append(
                    f'<rect x="{20 + expert * size}" y="{row * size}" width="{size - 2}" height="{size - 2}" '
                    f'fill="#0b6bcb" fill-opacity="{0.04 + 0.96 * dark:.2f}">'
                    f"<title>expert {expert}: {100 * share:.1f} %, even is {100 * even:.1f} %</title></rect>"
                )
        worst = max(max(shares) * len(shares) for shares in layers)
        said = f"{modality} experts, a row for each layer that has them; most used {worst:.2f} times even"
        drawn = f'width="{24 + len(layers[0]) * size}" height="{len(layers) * size}">{"".join(cells)}'
        parts.append(f"<figure><svg {drawn}</svg><figcaption>{said}</figcaption></figure>")
    return f'<h2>Expert usage</h2><div class="grid">{"".join(parts)}</div>' if parts else ""


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [(name, str(facts[name])) for name in ("trains", "data") if name in facts]
    rows += [
        (name, str(value)) for name, value in facts.get("recipe", {}).items() if value not in ("", [], {})
    ]
    cells = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f"<h2>Recipe</h2><table>{cells}</table>"


def _text(value: object) -> str:
    return html.escape(str(value))
