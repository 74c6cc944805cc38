"""What a benchmark measured: one row a request, percentiles over them, raw JSON and a plot.

Times are seconds from the moment a request was sent. Input and output tokens are counted apart. A request
that failed is a row with an error; it counts in no percentile and is never left out of the report.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(slots=True)
class Row:
    """One request: when it was sent, when each piece with tokens came, and how many tokens each had."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.token_times_s[0] - self.sent_s

    @property
    def total_s(self) -> float:
        return self.token_times_s[-1] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens; tokens that came together share their gap."""
        pairs = zip(self.token_times_s, self.token_times_s[1:], self.token_counts[1:], strict=False)
        return [(later - earlier) / count for earlier, later, count in pairs for _ in range(count)]


def summarize(rows: Sequence[Row], wall_s: float, **facts: Any) -> dict[str, Any]:
    """The figures of a run, with percentiles in milliseconds."""
    good = [row for row in rows if not row.error and row.token_times_s]
    gaps = [gap for row in good for gap in row.gaps_s]
    tokens_in, tokens_out = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    return {
        "requests": len(rows),
        "failed": len(rows) - len(good),
        "wall_s": wall_s,
        "input_tokens": tokens_in,
        "output_tokens": tokens_out,
        "input_tokens_per_s": tokens_in / wall_s,
        "output_tokens_per_s": tokens_out / wall_s,
        "requests_per_s": len(good) / wall_s,
        "first_token_ms": percentiles([row.first_s for row in good]),
        "between_tokens_ms": percentiles(gaps),
        "total_ms": percentiles([row.total_s for row in good]),
        "machine": platform.processor() or platform.machine(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
    }


def why_nothing(rows: Sequence[Row]) -> str:
    """The commonest error where no request was answered, else ""."""
    if any(not row.error and row.token_times_s for row in rows):
        return ""
    errors = Counter(row.error or "an answer without a token" for row in rows)
    return errors.most_common(1)[0][0] if errors else "nothing was asked"


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds; {} where nothing was measured."""
    if not seconds:
        return {}
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in (50, 95, 99)}


def write_report(folder: Path, name: str, runs: Sequence[tuple[dict[str, Any], Sequence[Row]]]) -> Path:
    """NAME.json with figures and raw rows, and NAME.png. Returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    raw = [{"figures": figures, "rows": [asdict(row) for row in rows]} for figures, rows in runs]
    path.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    _plot(folder / f"{name}.png", runs)
    return path


def _plot(path: Path, runs: Sequence[tuple[dict[str, Any], Sequence[Row]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis in (left, right):
        for share in (0.5, 0.95, 0.99):
            axis.axhline(share, color="0.85", linewidth=0.8, zorder=0)
            name = f"p{share * 100:.0f}"
            axis.text(1.01, share, name, transform=axis.get_yaxis_transform(), va="center", fontsize=7)
    for figures, rows in runs:
        good = [row for row in rows if not row.error and row.token_times_s]
        label = f"{figures.get('label', '')}, {figures['output_tokens_per_s']:.0f} tokens/s".lstrip(", ")
        for axis, values in (
            (left, [row.first_s for row in good]),
            (right, [gap for row in good for gap in row.gaps_s]),
        ):
            ordered = np.sort(np.asarray(values)) * 1e3
            axis.step(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), label=label)
    left.set(xlabel="time to the first token, ms", ylabel="share of requests")
    right.set(xlabel="between tokens, ms", ylabel="share of tokens", xscale="log")  # a few are far longer
    left.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def text_table(runs: Sequence[dict[str, Any]]) -> str:
    """The figures people look for first, one line a run."""
    titles = ("run", "out tok/s", "in tok/s", "first p50/p95/p99 ms", "gap p50/p95/p99 ms", "failed")
    lines = [_line(titles)]
    for run in runs:
        rates = f"{run['output_tokens_per_s']:.1f}", f"{run['input_tokens_per_s']:.1f}"
        times = _three(run["first_token_ms"]), _three(run["between_tokens_ms"])
        lines.append(_line((str(run.get("label", "")), *rates, *times, str(run["failed"]))))
    return "\n".join(lines)


def _three(values: dict[str, float]) -> str:
    return " / ".join(f"{values[p]:.1f}" for p in ("p50", "p95", "p99")) if values else "-"


def _line(cells: Sequence[str]) -> str:
    return " ".join(cell.rjust(width) for cell, width in zip(cells, (14, 10, 10, 24, 24, 6), strict=True))
