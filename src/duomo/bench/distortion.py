"""What the codes themselves lose, and what the plan's files weigh: `python -m duomo.bench.distortion`.

Mean squared error on 10^6 unit-variance Gaussian weights that no search saw, tail-biting streams of T steps,
integer codebooks as shipped; seconds a weight of the native encoder (best of five, one thread); and bits and
bytes of the 28B by its plan, from shapes.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from duomo.model import preset as model_preset
from duomo.quant.plan import build_plan
from duomo.quant.report import size_by_part
from duomo.trellis import PRESETS, encode
from duomo.trellis.search import distortion, gaussian

BOUND = {2: 0.0625, 4: 0.00390625}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="*", default=[128, 256, 640], help="none: only the speed")
    parser.add_argument("--weights", type=int, default=1 << 20)
    given = parser.parse_args()
    for code in PRESETS.values():
        for steps in given.steps:
            sample = gaussian(given.weights // steps, steps, seed=20_000 + steps)
            error = distortion(code, sample, num_threads=2)
            gap = 10 * np.log10(error / BOUND[code.bits])
            print(
                f"{code.name:8s} T={steps:4d}  distortion {error:.5f}  {gap:.2f} dB above the bound",
                flush=True,
            )
        sample = gaussian(64, 768, seed=1) / np.float32(code.unit)
        seconds = min(_timed(sample, code) for _ in range(5))
        print(f"{code.name:8s} encoding, T=768: {1e6 * seconds / sample.size:.4f} us a weight, 1 thread")
    for bits in ("2", "2.3"):
        config = model_preset("vl-28b-a3b")
        print(f"\nvl-28b-a3b, plan {bits}")
        for part, row in size_by_part(config, build_plan(bits, config)).items():
            print(
                f"  {part:28s} {row['weights']:15,} weights {row['bytes']:14,} bytes {row['bits']:8.4f} bits"
            )


def _timed(sample, code) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    encode(sample, code)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
