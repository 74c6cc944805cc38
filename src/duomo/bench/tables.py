"""Today's lcc2-12 against the table it had before its integers were polished: `python -m duomo.bench.tables`.

Both quantize SmolLM2's `ffn_down`, calibrated and judged as in `duomo.bench.quality down`, once for each seed
of the rotation's signs: one rotation is one draw of rounding errors, and a difference of two tables has to be
held against the spread between draws. Beside KL stands the outputs' error on unseen tokens, the mean over
layers, which later layers do not blur.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from duomo.bench.judged import Judge, kept, second_moments, windows
from duomo.bench.methods import trellis
from duomo.bench.quality import DOWN, OURS
from duomo.checkpoints.smollm2 import build_smollm2
from duomo.model import Ernie
from duomo.quant.feedback import output_error
from duomo.trellis import LCC2_12

FORMER = replace(
    LCC2_12,
    codebook=(
        -62, -47, -44, -40, -34, -34, -31, -28, -28, -24, -25, -24, -20, -20, -18, -17, -17, -17, -14, -12,
        -12, -10, -7, -10, -8, -5, -5, -5, -4, -3, -1, -1, 1, 2, 1, 3, 5, 6, 7, 5, 8, 10, 12, 13, 11, 13, 16,
        16, 18, 19, 20, 21, 22, 24, 28, 24, 32, 30, 35, 36, 39, 44, 48, 63,
    ),
    unit=0.04164,
)  # fmt: skip
TABLES = {"polished": LCC2_12, "former": FORMER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[5, 6, 7, 8])
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--judged-tokens", type=int, default=8192)
    parser.add_argument("--damping", type=float, default=0.15)
    parser.add_argument("--json", type=Path, help="write rows here; rows already in it are kept")
    given = parser.parse_args()
    model = build_smollm2(mixture=False)
    fitting, judging = windows("handbook", given.calibration_tokens), windows("foldoc", given.judged_tokens)
    judge = Judge(model, "dense", judging, given.json)
    fitted = kept("dense-down", fitting, lambda: second_moments(model, fitting, DOWN))
    unseen = kept("dense-down", judging, lambda: second_moments(model, judging, DOWN))
    weights = torch.stack([model.get_parameter(f"{name}.weight") for name in fitted])
    moments = torch.stack(list(fitted.values()))
    errors: list[float] = []

    def build(name: str, seed: int) -> Ernie:
        method = trellis(TABLES[name], given.damping, seed=seed)
        errors.clear()
        for home, weight, decoded in zip(fitted, weights, method(weights, moments), strict=True):
            errors.append(output_error(weight, decoded, unseen[home]))
            model.get_parameter(f"{home}.weight").data.copy_(decoded)
        return model

    for seed in given.seeds:
        for name in TABLES:
            title = f"{name}, seed {seed}"
            row = judge.show(title, OURS, lambda name=name, seed=seed: build(name, seed))  # type: ignore[misc]
            if "unseen_error" not in row:
                judge.keep(title, {**row, "unseen_error": statistics.fmean(errors)})
    for field in ("kl_mean", "unseen_error"):
        columns = [[judge.rows[f"{name}, seed {seed}"][field] for seed in given.seeds] for name in TABLES]
        steps = [a - b for a, b in zip(*columns, strict=True)]
        spread = statistics.stdev(steps) / len(steps) ** 0.5 if len(steps) > 1 else float("nan")
        means = ", ".join(
            f"{name} {statistics.fmean(c):.5f}" for name, c in zip(TABLES, columns, strict=True)
        )
        print(f"{field}: {means}; difference {statistics.fmean(steps):+.5f} ± {spread:.5f}")


if __name__ == "__main__":
    main()
