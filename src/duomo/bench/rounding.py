"""What rounding activations to bf16 costs: `python -m duomo.bench.rounding [--prompts 200]`.

The embedded model reads questions of the test split with their answers; at every text token the distribution
of fp32 products is compared with that of bf16 ones (`kernels.DenseForm`), both through the engine's own
runner. A quality figure: load does not change it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from duomo.bench.embedded import EMBEDDED, calibration_prompts, usual
from duomo.checkpoints import load_model
from duomo.engine.pages import PagePool
from duomo.engine.request import MediaBlob, Request, SamplingParams
from duomo.engine.runner import ModelRunner
from duomo.engine.scheduler import Scheduler
from duomo.kernels import DenseForm
from duomo.processing.prompt import Prompt
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import load_handwriting

NUM_PAGES, PAGE_SIZE = 128, 16
Logs = npt.NDArray[np.float64]


class Reader:
    """The embedded model with its products in one form."""

    def __init__(self, form: DenseForm) -> None:
        model = load_model(EMBEDDED, None).float()
        self._runner = ModelRunner(model, NUM_PAGES, PAGE_SIZE, form=form)
        self._num_read = 0

    def log_probabilities(self, prompt: Prompt) -> Logs:
        """[T, V] of a whole prompt."""
        media = MediaBlob.all_of(prompt)
        self._num_read += 1
        room = NUM_PAGES * PAGE_SIZE
        scheduler = Scheduler(PagePool(NUM_PAGES, PAGE_SIZE), max_step_tokens=room, has_prefix_cache=False)
        scheduler.add(Request(f"read-{self._num_read}", tuple(prompt.ids), SamplingParams(), media=media))
        (logits,) = self._runner.execute(scheduler.schedule(), [0])
        assert logits is not None, "plain weights are all in memory"
        scores = logits.astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))  # type: ignore[no-any-return]


def compare(num_prompts: int, cache: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(EMBEDDED)
    draws = usual(load_handwriting(cache, "test"), "test")
    prompts = calibration_prompts(draws, tokenizer, num_prompts)
    exact, rounded = Reader(DenseForm.PANELS), Reader(DenseForm.ROUNDED)
    kl, agrees = [], []
    for prompt in prompts:
        is_text = np.ones(len(prompt.ids), dtype=np.bool_)
        for medium, span in zip(prompt.media, prompt.spans, strict=True):
            is_text[span.start : span.start + medium.grid.num_tokens] = False
        p, q = (reader.log_probabilities(prompt)[is_text] for reader in (exact, rounded))
        kl += list((np.exp(p) * (p - q)).sum(-1))
        agrees += list(p.argmax(-1) == q.argmax(-1))
    return {
        "prompts": num_prompts,
        "positions": len(kl),
        "kl_mean": float(np.mean(kl)),
        "kl_standard_error": float(np.std(kl) / len(kl) ** 0.5),
        "kl_largest": float(np.max(kl)),
        "top1_agreement": float(np.mean(agrees)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = compare(args.prompts, args.cache)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
