"""`python -m duomo.bench.session CHECKPOINT --picture OUT.png`: resident weights over a session, drawn.

Text, a question about a picture, silence until the idle pools are let go, text again; what is resident by
part is sampled all the while. Needs matplotlib for the drawing; `--json` keeps the samples.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

from duomo.bench.memory import GREEDY, noise_picture, random_ids, resident_bytes
from duomo.llm import LLM
from duomo.processing.messages import Message

IDLE_S = 8.0
_PERIOD_S = 0.25
_COLOURS = {
    "text experts": "#2b6cb0",
    "attention, shared, embeddings": "#90b8e0",
    "vision experts": "#c05621",
    "vision tower": "#e8894a",
    "resampler": "#f6c9a4",
    "process and pages of keys": "#b8b8b8",
}


def sample(llm: LLM) -> dict[str, int]:
    assert llm.residency is not None
    parts = {name: int(row["resident_bytes"] or 0) for name, row in llm.residency.report().items()}
    whole = resident_bytes()["all"]
    rest = sum(size for name, size in parts.items() if name not in _COLOURS)
    kept = {name: parts.get(name, 0) for name in _COLOURS}
    kept["attention, shared, embeddings"] = rest
    kept["process and pages of keys"] = whole - sum(parts.values())
    return kept


def run(checkpoint: Path, side_px: int, text_tokens: int) -> dict[str, Any]:
    """Samples [(seconds, bytes by part)] and events [(seconds, what)]."""
    samples: list[tuple[float, dict[str, int]]] = []
    events: list[tuple[float, str]] = []
    stop = threading.Event()
    with LLM.open(checkpoint, max_model_tokens=4096, max_sequences=1, weights_idle_s=IDLE_S) as llm:
        begun = time.perf_counter()

        def watch() -> None:
            while not stop.wait(_PERIOD_S):
                samples.append((round(time.perf_counter() - begun, 3), sample(llm)))

        def note(what: str) -> None:
            events.append((round(time.perf_counter() - begun, 3), what))

        watcher = threading.Thread(target=watch)
        watcher.start()
        note("text")
        llm.generate(random_ids(llm, text_tokens), GREEDY)
        note("a picture arrives")
        llm.chat([Message.of("user", noise_picture(side_px), "What is this?")], GREEDY)
        note("idle")
        time.sleep(IDLE_S + 7)
        note("text again")
        llm.generate(random_ids(llm, text_tokens, seed=1), GREEDY)
        stop.set()
        watcher.join()
    return {"checkpoint": checkpoint.name, "idle_s": IDLE_S, "events": events, "samples": samples}


def draw(found: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = [seconds for seconds, _ in found["samples"]]
    layers = [[parts[name] / 1e9 for _, parts in found["samples"]] for name in _COLOURS]
    figure, axes = pyplot.subplots(figsize=(9, 4.2), dpi=110)
    axes.stackplot(times, *layers, labels=list(_COLOURS), colors=list(_COLOURS.values()), linewidth=0)
    top = max(sum(parts.values()) for _, parts in found["samples"]) / 1e9
    axes.set(xlim=(0, times[-1]), ylim=(0, top * 1.25), xlabel="seconds", ylabel="resident, GB")
    for seconds, what in found["events"]:
        axes.axvline(seconds, color="#444444", linewidth=0.8, linestyle=":")
        axes.text(seconds + 0.3, top * 1.18, what, fontsize=9, color="#222222")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("VL-28B at 2 bits: weights for pictures come and go with pictures", fontsize=11)
    figure.tight_layout()
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--side", type=int, default=448, help="side of the picture in pixels")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each text")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = run(options.checkpoint, options.side, options.tokens)
    if options.json:
        options.json.write_text(json.dumps(found) + "\n")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
