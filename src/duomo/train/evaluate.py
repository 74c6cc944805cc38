"""How well a model answers rows it does not learn from: loss, tokens, whole answers.

Whole answers here are teacher-forced: every token right given the right ones before it, which is exactly what
greedy decoding would have answered. `duomo eval MODEL --data` uses the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.stream import is_quantized
from duomo.model import Ernie
from duomo.train.forward import run_pack
from duomo.train.frozen import open_packed
from duomo.train.packing import Budget, pack
from duomo.train.peft import load_adapter
from duomo.train.samples import Renderer, Samples
from duomo.train.settings import Settings
from duomo.train.stages import EMBEDDED


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over `num_samples` rows: mean loss a token, share of tokens and of whole answers that are right.

    `by_kind`: how many rows of each `kind`, and the share whose whole answer, thought and all, is right.
    """

    num_samples: int
    num_tokens: int
    loss: float
    tokens_right: float
    answers_right: float
    by_kind: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(50.0, self.loss))


def evaluate_folder(
    model_folder: Path | None, files: Sequence[Path], adapter: Path | None = None, max_tokens: int = 4096
) -> Evaluation:
    """A checkpoint, plain or 2-bit, with an adapter or without, on rows. None is the embedded model."""
    folder = model_folder or EMBEDDED
    model = load_model(folder, None if is_quantized(folder) else torch.float32)
    if adapter is not None:
        open_packed(model)
        load_adapter(model, adapter)
    samples = Samples(files, Renderer.of(folder, model.config), max_tokens)
    settings = Settings("sft", "", [str(file) for file in files], max_tokens=max_tokens)
    return evaluate(model, samples, settings)


@torch.no_grad()
def evaluate(model: Ernie, samples: Samples, settings: Settings) -> Evaluation:
    budget = Budget(settings.max_tokens, settings.max_patches)
    total, tokens, right = 0.0, 0, 0
    whole: dict[str, list[bool]] = defaultdict(list)
    for one in pack(samples.tokens, samples.patches, budget):
        chosen = [samples[index] for index in one]
        output = run_pack(model, [s.prompt for s in chosen], [s.labels for s in chosen])
        is_right = output.right_L()
        wrong_S = output.by_sequence((~is_right).float())
        total -= float(output.log_probs().sum())
        tokens += output.labels_L.numel()
        right += int(is_right.sum())
        for index, wrong in zip(one, wrong_S.tolist(), strict=True):
            whole[samples.row(index).kind].append(wrong == 0)
    by_kind = {kind: (len(found), sum(found) / len(found)) for kind, found in sorted(whole.items()) if kind}
    answers_right = sum(map(sum, whole.values())) / len(samples)
    return Evaluation(len(samples), tokens, total / tokens, right / tokens, answers_right, by_kind)
