"""`python -m duomo.train.experiments.products`: a step of the recipe with bf16 products and without.

The same batches, interleaved, medians of processor seconds on one thread: other work on the machine disturbs
them less than wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from duomo.checkpoints import load_model
from duomo.model import Ernie
from duomo.processing.tokenizer import Tokenizer
from duomo.train import run
from duomo.train.precision import fast_products
from duomo.train.recipe import Recipe, Stage
from duomo.train.vision_stage import CellHead

EMBEDDED = Path(__file__).parents[2] / "assets" / "tiny"


def compare(cache: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward by stage, fp32 and bf16, and their ratio."""
    torch.set_num_threads(1)
    recipe = Recipe()
    model = run.build_model(Tokenizer.load(EMBEDDED), 0)
    model.load_state_dict(load_model(EMBEDDED, torch.float32).state_dict())
    head = run.build_head(model)
    found = {}
    for stage in (s for s in recipe.stages if s.name in ("eyes", "families")):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for step in range(repeats):
            batch = run.make_batch(recipe, stage, str(EMBEDDED), str(cache), step)
            for bf16, times in seconds.items():
                times.append(_step(model, head, stage, batch, bf16))
        plain, fast = (statistics.median(times) for times in seconds.values())
        found[stage.name] = {
            "fp32_s": round(plain, 3),
            "bf16_s": round(fast, 3),
            "ratio": round(plain / fast, 2),
        }
    return found


def _step(model: Ernie, head: CellHead, stage: Stage, batch: object, bf16: bool) -> float:
    model.zero_grad()
    begun = time.process_time()
    with fast_products(bf16, torch.device("cpu")):
        run.losses_of(stage, model, head, batch)[0].backward()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--repeats", type=int, default=6)
    given = parser.parse_args()
    print(json.dumps(compare(given.cache, given.repeats), indent=1))


if __name__ == "__main__":
    main()
