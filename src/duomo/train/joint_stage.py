"""The joint stage: pictures, questions and answers through the whole model.

The loss is cross-entropy on answers alone, plus per layer and modality a load balance and a z-loss on the
router; the correction bias of each expert is nudged after every step without any loss (spec 3.6).
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from duomo.kernels import cross_entropy
from duomo.model import Ernie
from duomo.tasks import Example, digits
from duomo.tasks.families import FAMILIES, LOOKUPS
from duomo.tasks.pools import Pools
from duomo.train.batches import BlockCache, TrainingBatch, collate, model_batch, patches_tensor
from duomo.train.recipe import Stage
from duomo.train.render import IGNORE, Renderer


def example_batch(
    rng: np.random.Generator, pools: Pools, renderer: Renderer, stage: Stage, batch_size: int
) -> TrainingBatch:
    """Examples of all families by their shares; what is left over by rounding goes by lot."""
    names, shares = [n for n, _ in stage.shares], np.array([share for _, share in stage.shares])
    exact = shares / shares.sum() * batch_size
    counts = exact.astype(int)
    drawn = rng.choice(
        len(names), size=batch_size - counts.sum(), p=(exact - counts) / (exact - counts).sum()
    )
    counts += np.bincount(drawn, minlength=len(names))
    examples: list[Example] = []
    for name, count in zip(names, counts, strict=True):
        for _ in range(count):
            if name == "digits":
                examples.append(digits.generate(rng, pools.handwriting, min_spacing=stage.min_spacing))
            elif name in LOOKUPS:
                examples.append(LOOKUPS[name](rng, pools, stage.num_lookups))
            else:
                examples.append(FAMILIES[name](rng, pools))
    return collate([renderer.render(example, rng, stage.alone) for example in examples], pad_id=0)


def answer_loss(model: Ernie, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the supervised tokens, and which of them are predicted rightly."""
    device = model.embed.weight.device
    patches = patches_tensor(batch)
    features = None if patches is None else model.encode(patches.to(device), batch.grids)
    if features is None:
        features = torch.zeros(0, model.config.hidden_size, device=device)
    hidden = model(model_batch(batch, model.config, features), BlockCache(batch, device))
    labels = torch.from_numpy(batch.labels_BL.reshape(-1)).to(device)
    labels = labels[labels != IGNORE]
    logits = model.unembed(hidden)
    return cross_entropy(logits, labels).mean(), logits.argmax(-1) == labels


def exact_answers(batch: TrainingBatch, right: Tensor) -> dict[str, list[bool]]:
    """By kind: was every token predicted? Teacher-forced, that is the exact match of greedy decoding."""
    labels = batch.labels_BL
    verdict_BL = np.ones(labels.shape, dtype=bool)
    verdict_BL[labels != IGNORE] = right.cpu().numpy()
    found: dict[str, list[bool]] = defaultdict(list)
    for sample, kinds in enumerate(batch.kinds):
        row = batch.places[sample].row
        for index, kind in enumerate(kinds, start=1):
            # A label stands on the token before, which for a block's first token is the block's own.
            own = (batch.sample_BL[row] == sample) & (batch.block_BL[row] == index)
            found[kind].append(bool(verdict_BL[row][own].all()))
    return found
