"""The joint stage: pictures, questions and answers through the whole model.

The loss is cross-entropy on answers alone, plus per layer and modality a load balance and a z-loss on the
router; the correction bias of each expert is nudged after every step without any loss (spec 3.6).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.model import Ernie
from duomo.tasks import Example, Handwriting, Split, dialogue, digits, shapes
from duomo.train.batches import BlockCache, TrainingBatch, collate, model_batch, patches_tensor
from duomo.train.recipe import Stage
from duomo.train.render import IGNORE, Renderer
from duomo.train.routing import RouterWatch

__all__ = ["RouterWatch", "answer_loss", "exact_answers", "example_batch"]


def example_batch(
    rng: np.random.Generator,
    pool: Handwriting,
    split: Split,
    renderer: Renderer,
    stage: Stage,
    batch_size: int,
) -> TrainingBatch:
    """Examples of all families by their shares; pictures of digits on one canvas size a batch."""
    canvas_px = digits.CANVASES_PX[int(rng.integers(len(digits.CANVASES_PX)))]
    names, shares = [n for n, _ in stage.shares], np.array([share for _, share in stage.shares])
    counts = np.round(shares * batch_size).astype(int)
    examples: list[Example] = []
    for name, count in zip(names, counts, strict=True):
        for _ in range(count):
            if name == "digits":
                examples.append(digits.generate(rng, pool, canvas_px, min_spacing=stage.min_spacing))
            elif name == "shapes":
                examples.append(shapes.generate(rng, split))
            else:
                examples.append(dialogue.generate(rng, split))
    return collate([renderer.render(example, rng) for example in examples], pad_id=0)


def answer_loss(model: Ernie, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the supervised tokens, and which of them are predicted rightly."""
    patches = patches_tensor(batch)
    features = None if patches is None else model.encode(patches, batch.grids)
    hidden = model(model_batch(batch, model.config, features), BlockCache(batch.block_BL))
    labels = torch.from_numpy(batch.labels_BL.reshape(-1))
    labels = labels[labels != IGNORE]
    logits = model.unembed(hidden)
    return F.cross_entropy(logits, labels), logits.argmax(-1) == labels


def exact_answers(batch: TrainingBatch, right: Tensor) -> dict[str, list[bool]]:
    """By kind: was every token predicted? Teacher-forced, that is the exact match of greedy decoding."""
    labels = batch.labels_BL
    verdict_BL = np.ones(labels.shape, dtype=bool)
    verdict_BL[labels != IGNORE] = right.numpy()
    found: dict[str, list[bool]] = defaultdict(list)
    for row, kinds in enumerate(batch.kinds):
        for index, kind in enumerate(kinds, start=1):
            # A label stands on the token before, which for a block's first token is the block's own.
            found[kind].append(bool(verdict_BL[row][batch.block_BL[row] == index].all()))
    return found
