"""What the embedded model learnt in which minute: `python -m duomo.train.experiments.curve MINUTES:LOG ...`.

LOG is what `python -m duomo.train` printed, MINUTES the processor time spent before it began. Rates fall
within a stage and rise at the next: the steps in the curves are those. Needs `duomo[train]`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from duomo.train.recipe import Recipe

_STEP = re.compile(r"(\w+) (\d+)/\d+ loss ([\d.]+) right ([\d.]+) %.* CPU ([\d.]+) min")
_SCORE = re.compile(r"([a-z]+/[a-z ]+) (\d+)")
_SHOWN = ("digits/read", "digits/sum thinking", "charts/value", "circuits/read", "clips/direction")
_SHOWN_LATER = ("clips/event", "places/where", "surface/verdict", "meters/read display")
_BUDGET_MINUTES = 720


def read_log(text: str, minutes_before: float) -> list[dict[str, Any]]:
    """A row a line of progress: stage, step, processor minutes, loss, right tokens; scores where judged."""
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        if found := _STEP.match(line):
            stage, step, loss, right, minutes = found.groups()
            spent = round(minutes_before + float(minutes), 1)
            row = {"stage": stage, "step": int(step), "minutes": spent, "loss": float(loss)}
            rows.append(row | {"right": float(right)})
        elif line.strip().startswith("dev:") and rows:
            rows[-1]["dev"] = {kind: int(share) for kind, share in _SCORE.findall(line)}
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Right tokens of training answers, and kinds of questions on development data, over processor time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    dense = {stage.name for stage in Recipe().stages if stage.is_dense}  # they count cells, not words
    answers = [row for row in rows if row["stage"] not in dense]
    for stage in dict.fromkeys(row["stage"] for row in answers):
        own = [row for row in answers if row["stage"] == stage]
        above.plot([row["minutes"] for row in own], [row["right"] for row in own], label=stage)
    above.set_ylim(90, 98)
    above.set_ylabel("right tokens of training answers, %")
    judged = [row for row in answers if "dev" in row]
    for kind, line in [*((k, "o-") for k in _SHOWN), *((k, "s--") for k in _SHOWN_LATER)]:
        own = [row for row in judged if kind in row["dev"]]
        below.plot([row["minutes"] for row in own], [row["dev"][kind] for row in own], line, label=kind)
    below.set_ylabel("right answers, development data, %")
    below.set_xlabel(f"processor minutes of {_BUDGET_MINUTES}")
    for axes in (above, below):
        axes.axvline(_BUDGET_MINUTES, color="0.6", linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", nargs="+", metavar="MINUTES:LOG")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/training/curve.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/pictures/learning.png"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for item in given.logs:
        minutes, _, path = item.partition(":")
        rows += read_log(Path(path).read_text(encoding="utf-8"), float(minutes))
    given.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    plot(rows, given.plot)


if __name__ == "__main__":
    main()
