"""What borrowing is worth to experts that few tokens chose, and choosing the damping: `duomo.bench.rare`.

KL of the whole model hides what happens to a rare expert: hardly any judged token reads it. Here every
expert's matrix is judged for itself: by the share of its outputs' energy that rounding loses, on the tokens
that chose it out of some thousand unseen prompts. The embedded model's routed experts are quantized from few
and from more calibration prompts, in these ways:

    shrunk    each expert's second moments drawn toward its layer's by how few it heard, strongly
    less      the same, but an expert is believed sooner: as the pipeline does
    own       each by what it heard itself
    layer     each by what its whole layer heard

`near` is the pipeline's other help for rare experts: they hear also tokens that almost chose them. All at
each of the dampings that the pipeline chooses among by held-out tokens; that choice is a row too. Two ways
are compared tensor by tensor, as a ratio of errors; the standard error is over the means of the layers'
parameters, since the experts of one share much. With `--json FILE` what was measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from duomo.bench.ablation import own
from duomo.bench.embedded import EMBEDDED, calibration_prompts, usual
from duomo.checkpoints import load_model
from duomo.model import Ernie, PackedCausal
from duomo.processing.tokenizer import Tokenizer
from duomo.quant.calibration import BankGrams, CalibrationBatch, Recorder, build_batches
from duomo.quant.feedback import output_error, quantize_bank
from duomo.quant.hessian import Gram
from duomo.quant.layer import DAMPINGS, bank_hessians, choose_damping, held_hessians, seed_of
from duomo.tasks import load_handwriting
from duomo.trellis import LCC2_12

Banks = Mapping[str, tuple[BankGrams, BankGrams]]
Rows = dict[str, dict[str, list[float]]]
"""Of each way, by parameter: a figure for each expert."""

TOKENS = "tokens over width"
BINS = ((0.0, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (4.0, math.inf))
"""Tokens that chose an expert over its inputs' width: below 1 its own second moments have not full rank."""


def pooled(grams: BankGrams, part: str) -> list[Tensor]:
    """Every expert by what the layer heard; for down, by what all experts' insides were."""
    if part == "gate_up":
        return [grams.layer.matrix] * len(grams.gate_up)
    pool = Gram(grams.down[0].size)
    for gram in grams.down:
        pool.matrix += gram.matrix
    return [pool.matrix] * len(grams.down)


WAYS: dict[str, tuple[Callable[[BankGrams, str], list[Tensor]], bool]] = {
    "shrunk, near": (partial(bank_hessians, trust=1.4), True),
    "less, near": (bank_hessians, True),
    "own, near": (own, True),
    "shrunk": (partial(bank_hessians, trust=1.4), False),
    "own": (own, False),
    "layer": (pooled, False),
}


STRONGLY, CHOSEN = "shrunk, near", "{}, chosen"


@torch.inference_mode()
def hear(model: Ernie, batches: Sequence[CalibrationBatch], hears_near: bool, splits: bool) -> Banks:
    """What the banks read; without `splits` held-out prompts count as fitted."""
    with Recorder(model, hears_near=hears_near) as recorder:
        for item in batches:
            recorder.listen(item.is_held_out and splits)
            model(item.batch, PackedCausal())
    return recorder.banks


def parameters(model: Ernie) -> Iterator[tuple[str, str, str, Tensor]]:
    """(name, bank, part, weights) of every bank of experts."""
    for name, weights in model.named_parameters():
        if weights.dim() == 3:
            home, _, part = name.rpartition(".")
            yield name, home, part, weights.data


class Bench:
    """Errors by calibration prompts, way and damping, kept in a file."""

    def __init__(self, cache: Path, judged: int, path: Path | None) -> None:
        self.model = load_model(EMBEDDED, torch.float32).eval().requires_grad_(False)
        self._tokenizer, self._pool = Tokenizer.load(EMBEDDED), load_handwriting(cache, "train")
        self._path = path
        self.kept: dict[str, Rows] = json.loads(path.read_text()) if path and path.exists() else {}
        self._judges = hear(self.model, self._batches(judged, 12), hears_near=False, splits=False)

    def _batches(self, num: int, seed: int) -> list[CalibrationBatch]:
        return build_batches(self.model, calibration_prompts(usual(self._pool), self._tokenizer, num, seed))

    def measure(self, num_prompts: int) -> None:
        """All ways from so many prompts; writes the file after each."""
        kept = self.kept.setdefault(str(num_prompts), {})
        batches = self._batches(num_prompts, 11)
        heard = {near: hear(self.model, batches, near, splits=True) for near in (True, False)}
        kept[TOKENS] = {
            name: [round(n / weights.shape[-1], 4) for n in heard[False][home][0].num_tokens]
            for name, home, _, weights in parameters(self.model)
        }
        for way in WAYS:
            if CHOSEN.format(way) not in kept:
                kept |= self._way(way, heard[WAYS[way][1]])
                print(f"{num_prompts} prompts: {way}", flush=True)
            if self._path:
                self._path.write_text(json.dumps(self.kept, separators=(",", ":")) + "\n", encoding="utf-8")

    def _way(self, way: str, heard: Banks) -> Rows:
        """Errors at each damping, and at that which held-out tokens choose for each parameter."""
        rows: Rows = {f"{way}, {damping}": {} for damping in (*DAMPINGS, "chosen")}
        for name, home, part, weights in parameters(self.model):
            fitted, held = heard[home]
            hessians, seed = WAYS[way][0](fitted, part), seed_of(name, 0)
            judge = self._judges[home][0]
            judges = [gram.matrix for gram in (judge.gate_up if part == "gate_up" else judge.down)]
            for damping in DAMPINGS:
                tensors = quantize_bank(weights, hessians, LCC2_12, seed, damping)
                decoded = (torch.from_numpy(tensor.decode()) for tensor in tensors)
                rows[f"{way}, {damping}"][name] = [
                    round(output_error(*triple), 5) for triple in zip(weights, decoded, judges, strict=True)
                ]
            chosen = choose_damping(weights, hessians, held_hessians(held, part), LCC2_12, seed)
            rows[CHOSEN.format(way)][name] = rows[f"{way}, {chosen}"][name]
        return rows if way == STRONGLY else {CHOSEN.format(way): rows[CHOSEN.format(way)]}


def compare(
    kept: Mapping[str, Rows], first: str, second: str, least: float = 0.0, below: float = math.inf
) -> tuple[float, float, int]:
    """(first's errors over second's, standard error, tensors) among experts with so many tokens."""
    logs: dict[str, list[float]] = defaultdict(list)
    for rows in kept.values():
        for name, tokens in rows[TOKENS].items():
            for n, a, b in zip(tokens, rows[first][name], rows[second][name], strict=True):
                if least <= n < below and a > 0 and b > 0:  # 0: no judged token chose it
                    logs[name].append(math.log(a / b))
    means = [statistics.fmean(own) for own in logs.values()]
    if len(means) < 2:
        return math.nan, math.nan, sum(map(len, logs.values()))
    ratio = math.exp(statistics.fmean(means))
    return ratio, ratio * statistics.stdev(means) / len(means) ** 0.5, sum(map(len, logs.values()))


def table(kept: Mapping[str, Rows], pairs: Sequence[tuple[str, str]]) -> str:
    """Ratios of errors by how many tokens an expert heard."""
    heads = [f"{low:g} to {high:g}" if high < math.inf else f"{low:g} and more" for low, high in BINS]
    lines = [
        "| tokens over width | " + " | ".join([*heads, "all"]) + " |",
        "| --- |" + " ---: |" * (len(BINS) + 1),
    ]
    counts = [compare(kept, *pairs[0], *own)[2] for own in (*BINS, (0.0, math.inf))]
    lines.append("| tensors | " + " | ".join(map(str, counts)) + " |")
    for first, second in pairs:
        cells = (compare(kept, first, second, *own) for own in (*BINS, (0.0, math.inf)))
        lines.append(
            f"| {first} over {second} | " + " | ".join(f"{r:.3f} ± {e:.3f}" for r, e, _ in cells) + " |"
        )
    return "\n".join(lines)


PAIRS = (
    ("less, near, chosen", "shrunk, near, chosen"),
    ("own, near, chosen", "shrunk, near, chosen"),
    ("shrunk, chosen", "shrunk, near, chosen"),
    ("own, chosen", "shrunk, near, chosen"),
    ("layer, chosen", "shrunk, near, chosen"),
    *((f"shrunk, near, {damping}", "shrunk, near, chosen") for damping in DAMPINGS),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 48, 144, 432], help="to calibrate on")
    parser.add_argument("--judged", type=int, default=1200, help="prompts to judge on, none of them the same")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--json", type=Path, help="write errors here; those already in it are kept")
    given = parser.parse_args()
    bench = Bench(given.cache, given.judged, given.json)
    for num in given.prompts:
        bench.measure(num)
    print(table(bench.kept, PAIRS))


if __name__ == "__main__":
    main()
