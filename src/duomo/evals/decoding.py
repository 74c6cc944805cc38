"""Greedy generation for many prompts at once, through the model alone: what the evaluations are made of.

The plain key-value cache, no scheduler and no sampling, so that an accuracy measured here is the model's and
not a server's. Every prompt keeps its own sequence; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duomo.model import Batch, Ernie, PlainCache, build_batch, token_routes
from duomo.processing.patches import normalize
from duomo.processing.prompt import Prompt


@dataclass(slots=True)
class _Running:
    """Sequences in step: the last token of each, where the next one stands, and what was generated."""

    tokens: list[int]
    positions: list[int]
    outputs: list[list[int]]


@torch.inference_mode()
def generate_greedy(
    model: Ernie, prompts: Sequence[Prompt], eos_ids: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the token that ended it."""
    if not prompts:
        return []
    cache = PlainCache()
    batch = _prefill(model, prompts)
    running = _Running([], _next_positions(batch), [[] for _ in prompts])
    ended = [False] * len(prompts)
    hidden = model(batch, cache)[torch.tensor(np.cumsum(batch.num_new) - 1)]
    for _ in range(max_tokens):
        running.tokens = model.unembed(hidden).argmax(-1).tolist()
        for index, token in enumerate(running.tokens):
            ended[index] = ended[index] or token in eos_ids
            if not ended[index]:
                running.outputs[index].append(token)
        if all(ended):
            break
        hidden = model(_step(model, running), cache)
        running.positions = [position + 1 for position in running.positions]
    return running.outputs


def _prefill(model: Ernie, prompts: Sequence[Prompt]) -> Batch:
    media = [medium for prompt in prompts for medium in prompt.media]
    features: Tensor | None = None
    if media:
        patches = np.concatenate([normalize(medium.patches) for medium in media])
        features = model.encode(torch.from_numpy(patches), [medium.grid for medium in media])
    return build_batch(
        [prompt.ids for prompt in prompts], model.config, [prompt.spans for prompt in prompts], features
    )


def _next_positions(batch: Batch) -> list[int]:
    pieces = batch.positions_3T.split(list(batch.num_new), dim=1)
    return [int(piece.max()) + 1 for piece in pieces]


def _step(model: Ernie, running: _Running) -> Batch:
    ids = np.asarray(running.tokens, dtype=np.int64)
    is_vision = token_routes(ids, model.config)
    return Batch(
        ids_T=torch.from_numpy(ids),
        positions_3T=torch.tensor(running.positions).expand(3, -1),
        text_rows=torch.from_numpy(np.flatnonzero(~is_vision)),
        vision_rows=torch.from_numpy(np.flatnonzero(is_vision)),
        num_new=(1,) * len(ids),
        num_cached=(1,) * len(ids),  # at least one; the plain cache knows how many
    )
