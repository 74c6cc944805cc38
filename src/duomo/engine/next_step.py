"""Steps in which every sequence computes one token of text: one native call, from ids to likeliest tokens.

That is nearly every step once prompts are read. Anything else (a chunk, a draft, a picture's token, an
adapter, a trace of experts) goes by `batch` and the model, with the same numbers. Arrays are kept from step
to step and only what has changed is written: of a small model's step, making them would take most.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from duomo.engine.batch import Track
from duomo.engine.kv import PagedCache
from duomo.engine.scheduler import Work
from duomo.kernels import NextTokens
from duomo.model.ernie import Ernie
from duomo.model.plain_decoder import PlainDecoder
from duomo.model.positions import token_routes

Floats = npt.NDArray[np.float32]
_ROWS, _WIDTH = 8, 64  # of sequences and pages, at first


class NextStep:
    def __init__(self, model: Ernie, decoder: PlainDecoder, cache: PagedCache) -> None:
        self._decoder, self._cache, self._vocab_size = decoder, cache, model.config.vocab_size
        routes = token_routes(np.arange(self._vocab_size), model.config)
        self._vision_ids = frozenset(np.flatnonzero(routes).tolist())
        self._make_room(_ROWS, _WIDTH)

    @classmethod
    def of(cls, model: Ernie, cache: PagedCache) -> NextStep | None:
        """None for a model whose step is not one call with its two ends."""
        decoder = model.decoder
        if not isinstance(decoder, PlainDecoder) or decoder.ends is None:
            return None
        return cls(model, decoder, cache)

    def run(self, works: Seq[Work], tracks: Seq[Track]) -> tuple[list[Floats], list[int]] | None:
        """Logits [1, V] and likeliest token of each work, good until the next call. None: not such a step."""
        ids: list[int] = []
        positions: list[int] = []
        num_keys: list[int] = []
        for work, track in zip(works, tracks, strict=True):
            known, start = work.sequence.ids, work.start
            if start < track.num_prompt or start + 1 != len(known) or work.count != 1 or not track.is_plain:
                return None
            ids.append(known[start])
            positions.append(start - track.num_prompt + track.next_position)
            num_keys.append(start + 1)
        if not self._vision_ids.isdisjoint(ids):
            return None
        self._write_pages(works)
        count = len(ids)
        self._tokens.numbers[:, :count] = (ids, positions, num_keys)
        if not self._decoder.next(count, self._tokens, max(positions)):
            return None
        return list(self._tokens.logits[:count, None]), self._tokens.likeliest[:count].tolist()

    def _write_pages(self, works: Seq[Work]) -> None:
        """A list of pages only grows until its sequence is preempted; then it gets another list."""
        if len(works) > self._tokens.capacity:
            self._make_room(2 * len(works), self._tokens.width)
        written = self._written
        for row, work in enumerate(works):
            pages = work.sequence.pages
            known, count = written[row]
            if known is pages and count == len(pages):
                continue
            if len(pages) > self._tokens.width:
                self._make_room(self._tokens.capacity, 2 * len(pages))
                return self._write_pages(works)
            place = self._tokens.pages[row]
            place[: len(pages)] = pages
            place[: len(pages)] += 1  # page 0 is nobody's
            written[row] = (pages, len(pages))
        return None

    def _make_room(self, num_rows: int, num_pages: int) -> None:
        cache = self._cache
        self._tokens = NextTokens(
            num_rows, num_pages, self._vocab_size, cache.store, cache.scale, cache.page_size
        )
        self._written: list[tuple[list[int], int]] = [([], 0)] * num_rows
