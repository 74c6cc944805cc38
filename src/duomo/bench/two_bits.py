"""Every family of the embedded model at 2 bits against bf16: `python -m duomo.bench.two_bits`.

Whatever weights are shipped: they are quantized into `runs/two-bits-DIGEST` (experts at 2 bits, shared and
dense ones at 4, attention at 8, tower and embeddings at 6, scales tuned), calibrated on every family's
training split, and both answer the same held-out questions (`duomo.evals.paired`). Nothing of it is done
twice: a run that was killed goes on with the layer, or the block of questions, that it was in; other weights
get a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from duomo.bench.embedded import EMBEDDED, all_families, build, calibration_prompts
from duomo.checkpoints.checksums import sha256_of
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks.pools import load_pools


def quantized(source: Path, runs: Path, num_prompts: int, cache: Path, threads: int) -> Path:
    """The folder of the source's 2-bit copy, made or made to its end where it is not."""
    digest = sha256_of(source / "model.safetensors")[:12]
    target = runs / f"two-bits-{digest}-{num_prompts}"
    if not (target / "config.json").exists():  # written last
        draws = all_families(load_pools(cache, "train"))
        prompts = calibration_prompts(draws, Tokenizer.load(source), num_prompts)
        build(source, target, prompts, is_quarter=True, is_tuned=True, num_threads=threads)
    report = json.loads((target / "report.json").read_text())
    ratio = report["file_bytes"] / report["source_bytes"]
    print(f"{target}: {report['file_bytes']:,} bytes, {ratio:.4f} of bf16", flush=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=EMBEDDED)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the copy and answers are kept")
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/cache"), help="where pictures are fetched to"
    )
    parser.add_argument("--prompts", type=int, default=1200, help="to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read", type=int, default=1600, help="pictures to read")
    parser.add_argument("--other", type=int, default=400, help="questions of every other kind")
    parser.add_argument("--family", type=int, default=100, help="of every kind of the wider families")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/paired.json"))
    given = parser.parse_args()
    target = quantized(given.source, given.runs, given.prompts, given.cache, given.threads)
    asked = [f"--{name}={getattr(given, name)}" for name in ("read", "other", "family", "cache", "json")]
    command = [sys.executable, "-m", "duomo.evals.paired", given.source, target, *asked]
    sys.exit(subprocess.run([*command, f"--kept={given.runs / 'paired'}"]).returncode)


if __name__ == "__main__":
    main()
