"""From a step's works to a model `Batch`: ids, positions, routes, slots and page tables, chunk by chunk.

Every token keeps the position and the bank it has in the whole prompt, wherever a chunk begins: both are
worked out once per request (`Track`). Drafts and answers stand one after another past the prompt's end.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from duomo.engine.request import Request
from duomo.engine.scheduler import Work
from duomo.model.config import ModelConfig
from duomo.model.inputs import Batch
from duomo.model.positions import Ints, build_positions, token_routes
from duomo.processing.prompt import Grid, MediaSpan


class Track:
    """Positions of one request's prompt, where its answer goes on, and its pictures' features."""

    def __init__(self, request: Request) -> None:
        spans = [MediaSpan(medium.start, Grid(*medium.grid)) for medium in request.media]
        self.num_prompt = len(request.ids)
        self.positions = build_positions(self.num_prompt, spans)
        self.next_position = int(self.positions.max()) + 1
        self.media = request.media
        self.is_plain = not request.adapter and not request.params.return_experts
        self.features: dict[int, Tensor] = {}  # by index of the medium, while its tokens are computed

    def slice(self, start: int, stop: int) -> Ints:
        """Positions [3, stop - start]."""
        inside = self.positions[:, start : min(stop, self.num_prompt)]
        first = max(start, self.num_prompt) - self.num_prompt + self.next_position
        count = stop - max(start, self.num_prompt)
        if count <= 0:
            return inside
        beyond = np.broadcast_to(np.arange(first, first + count), (3, count))
        return np.concatenate((inside, beyond), axis=1)

    def media_in(self, start: int, stop: int) -> list[int]:
        """Which media have tokens in the chunk."""
        if not self.media:
            return []
        return [
            index
            for index, medium in enumerate(self.media)
            if medium.start < stop and start < medium.start + medium.num_tokens
        ]


def build_step_batch(
    works: Seq[Work], tracks: Seq[Track], config: ModelConfig, page_size: int, logit_starts: Seq[int]
) -> Batch:
    """`logit_starts[i]`: logits of work i are wanted from this token of it on.

    Rows are gathered as lists of ints: most works are one token, and an array costs more than what is in it.
    """
    ids: list[int] = []
    slots: list[int] = []
    places: tuple[list[int], list[int], list[int]] = ([], [], [])  # t, h, w
    seen: list[int] = []
    owner: list[int] = []
    wanted: list[int] = []
    feature_rows, features = [], []
    width = max(len(work.sequence.pages) for work in works)
    page_table = np.full((len(works), width), -1, dtype=np.int64)
    for row, (work, track, wanted_from) in enumerate(zip(works, tracks, logit_starts, strict=True)):
        sequence, start, count = work.sequence, work.start, work.count
        first_row, stop = len(ids), start + count
        known = sequence.ids[start:stop]
        ids += known
        ids += work.drafts[: count - len(known)]
        pages = sequence.pages
        page_table[row, : len(pages)] = pages
        if count == 1:
            slots.append((pages[start // page_size] + 1) * page_size + start % page_size)
        else:
            slots += ((pages[i // page_size] + 1) * page_size + i % page_size for i in range(start, stop))
        if start >= track.num_prompt:
            first = start - track.num_prompt + track.next_position
            for axis in places:
                axis += range(first, first + count)
        else:
            for axis, own in zip(places, track.slice(start, stop).tolist(), strict=True):
                axis += own
        seen += range(start + 1, stop + 1)
        owner += [row] * count
        wanted += range(first_row + wanted_from, first_row + count)
        for medium_index in track.media_in(start, stop):
            medium = track.media[medium_index]
            low, high = max(start, medium.start), min(stop, medium.start + medium.num_tokens)
            feature_rows.append(np.arange(low, high) - start + first_row)
            features.append(track.features[medium_index][low - medium.start : high - medium.start])
    page_table += 1  # page 0 is nobody's
    array = np.array(ids, dtype=np.int64)
    is_vision = token_routes(array, config)
    return Batch(
        ids_T=torch.from_numpy(array),
        positions_3T=_ints(places),
        text_rows=torch.from_numpy(np.flatnonzero(~is_vision)),
        vision_rows=torch.from_numpy(np.flatnonzero(is_vision)),
        num_new=tuple(work.count for work in works),
        num_cached=tuple(work.start for work in works),
        feature_rows=torch.from_numpy(np.concatenate(feature_rows)) if feature_rows else None,
        features_RD=torch.cat(features) if features else None,
        slots_T=_ints(slots),
        page_table_SM=torch.from_numpy(page_table),
        sequence_T=_ints(owner),
        num_keys_T=_ints(seen),
        logit_rows=None if len(wanted) == len(ids) else _ints(wanted),
    )


def _ints(values: object) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))


_NO_EXPERT = 255


def no_choice(config: ModelConfig, num_tokens: int) -> Tensor:
    """[layers, T, K] for a pass to write its choices into."""
    return torch.full((config.num_layers, num_tokens, max(1, config.num_chosen)), _NO_EXPERT)
