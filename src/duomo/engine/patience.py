"""A forward pass that carries each request as far as its experts are in memory; none waits for another.

Under a cap some chosen experts lie on disk. As soon as a layer's router has spoken, a request that misses
one has it read in the background and stays at that layer with its hidden states; the others go on. The next
pass takes it up where it stopped. Results have the same bits as one pass in one go, since a row's bits do
not depend on its neighbours. Only when nobody can move is the disk waited for, and briefly, so that new
requests are heard.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duomo.checkpoints.hot_experts import Expert, HotExperts
from duomo.engine.batch import Track, build_step_batch, no_choice
from duomo.engine.scheduler import Work
from duomo.model.decoder import DecoderLayer
from duomo.model.ernie import Ernie
from duomo.model.experts import Experts
from duomo.model.inputs import Batch, KVCache
from duomo.model.packed_layers import PackedExperts
from duomo.model.rope import Rotation, decoder_rotation

PATIENCE_S = 0.05
"""Longest a pass waits for the disk when nobody can move, before new requests are taken in."""


@dataclass(slots=True, eq=False)
class Traveller:
    """A work on its way. `has_attended`: it stopped in `layer` between attention and experts."""

    work: Work
    track: Track
    start: int
    batch: Batch  # of this work alone
    hidden_TD: Tensor
    layer: int = 0
    has_attended: bool = False
    needs: frozenset[Expert] = frozenset()


Group = tuple[Batch, Rotation]


class PatientForward:
    """Of one model under a cap. `page_size` is the cache's."""

    def __init__(self, model: Ernie, cache: KVCache, page_size: int, hot: HotExperts) -> None:
        self.model, self.cache, self.page_size, self.hot = model, cache, page_size, hot
        self.num_stops = 0  # how often a work stayed behind for an expert
        self._stopped: dict[str, Traveller] = {}
        self._groups: dict[tuple[Traveller, ...], Group] = {}

    def run(self, works: Seq[Work], tracks: Seq[Track], starts: Seq[int]) -> list[Traveller | None]:
        """Each work with its final hidden states from its `starts` token on; None: it is still on its way.

        A work that came back None must come again, the same object, or it begins anew.
        """
        travellers = [self._take_up(*each) for each in zip(works, tracks, starts, strict=True)]
        deadline = time.monotonic() + PATIENCE_S
        num_layers = len(self.model.decoder.layers)
        while True:
            self._pass(travellers)
            left = deadline - time.monotonic()
            if left <= 0 or any(traveller.layer == num_layers for traveller in travellers):
                break
            self.hot.wait(left)
        self._groups.clear()
        arrived: list[Traveller | None] = []
        for traveller in travellers:
            name = traveller.work.sequence.request.request_id
            if traveller.layer < num_layers:
                self._stopped[name] = traveller
                arrived.append(None)
            else:
                self._stopped.pop(name, None)
                traveller.hidden_TD = self.model.decoder.norm(traveller.hidden_TD[traveller.start :])
                arrived.append(traveller)
        return arrived

    def forget(self, request_id: str) -> None:
        self._stopped.pop(request_id, None)

    def _take_up(self, work: Work, track: Track, start: int) -> Traveller:
        stopped = self._stopped.get(work.sequence.request.request_id)
        if stopped is not None and stopped.work is work:
            return stopped
        batch = build_step_batch([work], [track], self.model.config, self.page_size, [start])
        if work.sequence.request.params.return_experts:
            batch = replace(batch, expert_ids_LTK=no_choice(self.model.config, work.count))
        return Traveller(work, track, start, batch, self.model.enter(batch))

    def _pass(self, travellers: Seq[Traveller]) -> None:
        """One walk through the layers: everybody joins at the layer where it stands."""
        for index, layer in enumerate(self.model.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            here = [traveller for traveller in travellers if traveller.layer == index]
            arriving = [traveller for traveller in here if not traveller.has_attended]
            if arriving:
                self._attend(layer, index, arriving)
            going = [traveller for traveller in here if self.hot.holds(traveller.needs)]
            if going:
                self._mix(layer, index, going)
            self.hot.pinned = frozenset().union(*(traveller.needs for traveller in travellers))

    def _attend(self, layer: DecoderLayer, index: int, arriving: list[Traveller]) -> None:
        batch, rotation = self._group(arriving)
        hidden_TD = _joined(arriving)
        hidden_TD = hidden_TD + layer.attention(
            layer.input_norm(hidden_TD), rotation, index, batch, self.cache
        )
        _part(arriving, hidden_TD)
        if isinstance(layer.mlp, Experts):
            normed_TD = layer.post_norm(hidden_TD)
            row = 0
            for traveller in arriving:
                stop = row + traveller.work.count
                traveller.needs = self._needs(layer.mlp, index, traveller, normed_TD[row:stop])
                row = stop
        for traveller in arriving:
            traveller.has_attended = True

    def _needs(self, mlp: Experts, index: int, traveller: Traveller, normed_TD: Tensor) -> frozenset[Expert]:
        """What the routers choose; what of it is on disk is being read from now on."""
        needs: set[Expert] = set()
        for name, bank, rows in (
            ("text", mlp.text, traveller.batch.text_rows),
            ("vision", mlp.vision, traveller.batch.vision_rows),
        ):
            if isinstance(bank, PackedExperts) and rows.numel():
                full_name = f"decoder.layers.{index}.mlp.{name}"
                own_TD = normed_TD if len(rows) == len(normed_TD) else normed_TD[rows]
                ids = bank.route(own_TD).expert_ids_TK.unique().tolist()
                missing = self.hot.missing(full_name, ids)
                if missing:
                    self.hot.ask_for(missing)
                    self.num_stops += 1
                needs |= {(full_name, expert) for expert in ids}
        return frozenset(needs)

    def _mix(self, layer: DecoderLayer, index: int, going: list[Traveller]) -> None:
        batch, _ = self._group(going)
        hidden_TD = _joined(going)
        asked = [traveller.batch.expert_ids_LTK for traveller in going]
        chosen_TK = None
        if any(each is not None for each in asked):
            chosen_TK = torch.empty(len(hidden_TD), self.model.config.num_chosen, dtype=torch.int64)
        hidden_TD = hidden_TD + layer.mlp(layer.post_norm(hidden_TD), batch, chosen_TK)
        _part(going, hidden_TD)
        row = 0
        for traveller, chosen_LTK in zip(going, asked, strict=True):
            stop = row + traveller.work.count
            if chosen_LTK is not None and chosen_TK is not None and isinstance(layer.mlp, Experts):
                chosen_LTK[index] = chosen_TK[row:stop]
            row = stop
            traveller.layer, traveller.has_attended, traveller.needs = index + 1, False, frozenset()

    def _group(self, travellers: list[Traveller]) -> Group:
        """The batch of those who go together; the same company needs it made only once a run."""
        key = tuple(travellers)
        if key not in self._groups:
            works, tracks = [t.work for t in travellers], [t.track for t in travellers]
            starts = [t.start for t in travellers]
            batch = build_step_batch(works, tracks, self.model.config, self.page_size, starts)
            self._groups[key] = batch, decoder_rotation(batch.positions_3T, self.model.config)
        return self._groups[key]


def _joined(travellers: list[Traveller]) -> Tensor:
    return travellers[0].hidden_TD if len(travellers) == 1 else torch.cat([t.hidden_TD for t in travellers])


def _part(travellers: list[Traveller], hidden_TD: Tensor) -> None:
    row = 0
    for traveller in travellers:
        traveller.hidden_TD = hidden_TD[row : row + traveller.work.count]
        row += traveller.work.count
