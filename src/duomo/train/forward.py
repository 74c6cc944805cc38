"""One pass over a pack: whole sequences side by side, logits only where a label is.

Sequences attend within themselves (`PackedCausal`) and their positions begin anew, so a pack computes what
each would alone. All pictures of a pack go through the tower together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from duomo.kernels import cross_entropy
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.processing.patches import normalize
from duomo.processing.prompt import Grid, Prompt
from duomo.processing.template import IGNORE
from duomo.train.precision import fast_products


@dataclass(frozen=True, slots=True)
class PackOutput:
    """`logits_LV` of the L labelled tokens, their labels, and the sequence each belongs to."""

    logits_LV: Tensor
    labels_L: Tensor
    sequence_L: Tensor
    num_sequences: int
    num_tokens: int

    def log_probs(self) -> Tensor:
        """[L] of the labels."""
        return -cross_entropy(self.logits_LV.float(), self.labels_L)

    def by_sequence(self, values_L: Tensor) -> Tensor:
        """[S], summed over each sequence's labels."""
        empty = torch.zeros(self.num_sequences, device=values_L.device, dtype=values_L.dtype)
        return empty.index_add(0, self.sequence_L, values_L)

    def right_L(self) -> Tensor:
        return self.logits_LV.detach().argmax(-1) == self.labels_L


def run_pack(
    model: Ernie,
    prompts: Sequence[Prompt],
    labels: Sequence[Sequence[int]],
    bf16: bool = False,
    always_encode: bool = False,
) -> PackOutput:
    """`labels[s][t]` is the id wanted after token t of sequence s, or IGNORE.

    `always_encode`: a pack without pictures runs the tower on a blank one and adds nothing of it, since over
    several processes every exchange needs all of them, in the same order.
    """
    device = model.decoder.norm.weight.device
    spans = [prompt.spans for prompt in prompts]
    media = [medium for prompt in prompts for medium in prompt.media]
    with fast_products(bf16, device):
        features = None
        if media:
            patches = torch.from_numpy(normalize(np.concatenate([medium.patches for medium in media])))
            features = model.encode(patches.to(device), [medium.grid for medium in media])
        batch = build_batch([prompt.ids for prompt in prompts], model.config, spans, features, device)
        if always_encode and not media and model.vision_tower is not None:
            blank = model.encode(torch.zeros(4, 588, device=device), [Grid(1, 2, 2)])
            no_rows = torch.zeros(0, dtype=torch.int64, device=device)
            batch = replace(batch, feature_rows=no_rows, features_RD=blank[:0])
        flat = np.concatenate([np.asarray(one, dtype=np.int64) for one in labels])
        rows = np.flatnonzero(flat != IGNORE)
        owner = np.repeat(np.arange(len(prompts)), [len(prompt.ids) for prompt in prompts])
        hidden = model(replace(batch, logit_rows=torch.from_numpy(rows).to(device)), PackedCausal())
        logits = model.unembed(hidden)
    return PackOutput(
        logits,
        torch.from_numpy(flat[rows]).to(device),
        torch.from_numpy(owner[rows]).to(device),
        len(prompts),
        len(flat),
    )
