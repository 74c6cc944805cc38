"""What rounding activations to bf16 costs: `python -m duomo.bench.rounding [--prompts 200]`.

The embedded model reads questions of the test split with their answers; at every text token the distribution
of fp32 products is compared with that of bf16 ones (`kernels.DenseForm`), both through the engine's own
runner. Tokens are told apart by whether both forms chose the same experts for them. A quality figure: load
does not change it.
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

    def read(self, prompt: Prompt) -> tuple[Logs, npt.NDArray[np.uint8]]:
        """Log-probabilities [T, V] of a whole prompt, and the experts [T, layers, chosen] of its tokens."""
        media = MediaBlob.all_of(prompt)
        self._num_read += 1
        room = NUM_PAGES * PAGE_SIZE
        scheduler = Scheduler(PagePool(NUM_PAGES, PAGE_SIZE), max_step_tokens=room, has_prefix_cache=False)
        name, params = f"read-{self._num_read}", SamplingParams(return_experts=True)
        scheduler.add(Request(name, tuple(prompt.ids), params, media=media))
        step = scheduler.schedule()
        (logits,) = self._runner.execute(step, [0])
        assert logits is not None, "plain weights are all in memory"
        scores = logits.astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        logs: Logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        trace = step.traces[name]
        shape = (len(logs), trace.num_layers, trace.num_chosen)
        return logs, np.frombuffer(trace.expert_ids, np.uint8).reshape(shape)


def compare(num_prompts: int, cache: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(EMBEDDED)
    draws = usual(load_handwriting(cache, "test"), "test")
    prompts = calibration_prompts(draws, tokenizer, num_prompts)
    exact, rounded = Reader(DenseForm.PANELS), Reader(DenseForm.ROUNDED)
    kl, agrees, is_same = [], [], []
    for prompt in prompts:
        is_text = np.ones(len(prompt.ids), dtype=np.bool_)
        for medium, span in zip(prompt.media, prompt.spans, strict=True):
            is_text[span.start : span.start + medium.grid.num_tokens] = False
        (p, chosen), (q, chosen_rounded) = (reader.read(prompt) for reader in (exact, rounded))
        p, q = p[is_text], q[is_text]
        is_same += list((np.sort(chosen) == np.sort(chosen_rounded)).all((1, 2))[is_text])
        kl += list((np.exp(p) * (p - q)).sum(-1))
        agrees += list(p.argmax(-1) == q.argmax(-1))
    return {
        "prompts": num_prompts,
        "positions": len(kl),
        "kl_mean": float(np.mean(kl)),
        "kl_standard_error": float(np.std(kl) / len(kl) ** 0.5),
        "kl_largest": float(np.max(kl)),
        "top1_agreement": float(np.mean(agrees)),
        "other_experts": len(kl) - int(np.sum(is_same)),
        "kl_mean_same_experts": float(np.mean(np.asarray(kl)[is_same])),
        "kl_largest_same_experts": float(np.max(np.asarray(kl)[is_same])),
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
