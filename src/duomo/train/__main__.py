"""`python -m duomo.train`: the embedded model from nothing, or on from where it was stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from duomo.train.embedded import run
from duomo.train.vocabulary import VOCAB_SIZES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tiny"), help="where the run keeps its state"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    parser.add_argument("--steps", type=int, nargs="*", default=[], help="steps of each stage, in order")
    parser.add_argument("--from", dest="start", type=Path, help="a checkpoint to begin with")
    parser.add_argument("--stage", default="eyes", help="the stage that --from begins at")
    parser.add_argument("--size", default="tiny", choices=[*VOCAB_SIZES], help="mini needs a GPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="share the parts of a step among them")
    given = parser.parse_args()
    paths = given.folder, given.cache, given.steps, given.start
    sys.exit(run(*paths, given.stage, given.size, given.device, given.processes))


if __name__ == "__main__":
    main()
