"""Runs a step: swaps, pictures, one forward pass; gives back logits as numpy rows.

The engine knows a runner by four calls, so that a script can stand in for a model (`engine.scripted`).
A medium is encoded alone, so that its features do not depend on what else is asked.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from duomo.checkpoints.residency import Residency
from duomo.engine.adapters import Adapters
from duomo.engine.batch import Track, build_step_batch, no_choice
from duomo.engine.features import FeatureCache
from duomo.engine.kv import PagedCache
from duomo.engine.next_step import NextStep
from duomo.engine.patience import PatientForward
from duomo.engine.request import ExpertTrace, MediaBlob
from duomo.engine.scheduler import Sequence, Step, Work
from duomo.kernels import DenseForm
from duomo.model.ernie import Ernie
from duomo.model.inputs import Batch
from duomo.model.plain_decoder import fuse
from duomo.model.plain_vision import fuse_vision
from duomo.processing.patches import normalize
from duomo.processing.prompt import Grid

Floats = npt.NDArray[np.float32]


class Runner(Protocol):
    vocab_size: int
    adapters: Adapters

    @property
    def residency(self) -> Residency | None:
        """Of packed weights; None where weights are plain."""
        ...

    def execute(self, step: Step, logit_starts: Seq[int]) -> Seq[Floats | None]:
        """Logits [rows, V] of every work, from its `logit_starts` token on, good until the next call. None:
        the work has to come again, the same object, as weights it needs are on their way into memory.
        Where the pass found them, `step.likeliest` holds the argmax of each work's one row.
        """
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is over; whatever is kept for it may go."""
        ...

    def reset(self) -> None:
        """Drops caches that outlive requests."""
        ...

    def counters(self) -> dict[str, int]: ...


class ModelRunner:
    def __init__(
        self,
        model: Ernie,
        num_pages: int,
        page_size: int,
        kv_dtype: str = "float32",
        feature_bytes: int = 256 << 20,
        feature_folder: Path | None = None,
        fingerprint: str = "",
        form: DenseForm = DenseForm.BORROWED,
    ) -> None:
        """`form`: how plain weights are kept; all but borrowed are for those that do not change any more."""
        self.model = model.eval()
        fuse(self.model, form)
        fuse_vision(self.model, form)
        self.vocab_size = model.config.vocab_size
        self.cache = PagedCache(model.config, num_pages, page_size, kv_dtype)
        self.features = FeatureCache(feature_bytes, feature_folder, fingerprint)
        self.residency: Residency | None = None  # of packed weights; set by whoever opened them
        self.patient: PatientForward | None = None  # under a cap on them
        self.adapters = Adapters(self.model)
        self._next = NextStep.of(self.model, self.cache)
        self._tracks: dict[str, Track] = {}
        self._swapped: dict[str, list[torch.Tensor]] = {}

    def set_cap(self, cap_bytes: int, is_strict: bool = False) -> None:
        """Holds packed weights to `cap_bytes`; see `Residency.cap`."""
        assert self.residency is not None, "plain weights are all in memory"
        hot = self.residency.cap(cap_bytes, is_strict)
        self.patient = PatientForward(self.model, self.cache, self.cache.page_size, hot)

    def execute(self, step: Step, logit_starts: Seq[int]) -> Seq[Floats | None]:
        is_next = bool(step.works) and step.works[0].count == 1 and not (step.swap_out or step.swap_in)
        if is_next and self._next is not None and self.patient is None:
            found = self._next.run(step.works, [self._track(work.sequence) for work in step.works])
            if found is not None:
                rows, step.likeliest = found
                return rows
        return self._execute(step, logit_starts)

    @torch.inference_mode()
    def _execute(self, step: Step, logit_starts: Seq[int]) -> Seq[Floats | None]:
        for sequence, pages in step.swap_out:
            kept = self.cache.copy_out([page + 1 for page in pages])
            self._swapped[sequence.request.request_id] = kept
        for sequence, pages in step.swap_in:
            kept = self._swapped.pop(sequence.request.request_id)
            self.cache.copy_in([page + 1 for page in pages], kept)
        if step.works and all(work.count == 1 and not work.sequence.request.adapter for work in step.works):
            return self._forward(step.works, logit_starts, step.traces)
        pieces: list[Floats | None] = [None] * len(step.works)
        for adapter in dict.fromkeys(work.sequence.request.adapter for work in step.works):
            chosen = [i for i, work in enumerate(step.works) if work.sequence.request.adapter == adapter]
            chosen.sort(key=lambda i: step.works[i].count)  # equal counts side by side
            with self.adapters.use(adapter):
                works = [step.works[i] for i in chosen]
                rows = self._forward(works, [logit_starts[i] for i in chosen], step.traces)
            for i, piece in zip(chosen, rows, strict=True):
                pieces[i] = piece
        return pieces

    def _forward(
        self, works: Seq[Work], starts: Seq[int], traces: dict[str, ExpertTrace]
    ) -> Seq[Floats | None]:
        tracks = [self._track(work.sequence) for work in works]
        for work, track in zip(works, tracks, strict=True):
            if not track.media:
                continue
            for index in track.media_in(work.start, work.start + work.count):
                if index not in track.features:
                    track.features[index] = self._features(track.media[index], work.sequence.request.adapter)
        if self.patient is not None:
            return self._forward_patiently(self.patient, works, starts, traces)
        batch = build_step_batch(works, tracks, self.model.config, self.cache.page_size, starts)
        if any(work.sequence.request.params.return_experts for work in works):
            batch = replace(batch, expert_ids_LTK=no_choice(self.model.config, len(batch.ids_T)))
        logits = self.model.unembed(self.model(batch, self.cache)).float().numpy()
        if batch.expert_ids_LTK is not None:
            traces.update(_traces(works, batch))
        pieces = []
        row = 0
        for work, first in zip(works, starts, strict=True):
            pieces.append(logits[row : row + work.count - first])
            row += work.count - first
            self._drop_features(work.sequence, work.start + work.count)
        return pieces

    def _forward_patiently(
        self, patient: PatientForward, works: Seq[Work], starts: Seq[int], traces: dict[str, ExpertTrace]
    ) -> list[Floats | None]:
        arrived = patient.run(works, [self._track(work.sequence) for work in works], starts)
        done = [each.hidden_TD for each in arrived if each is not None]
        logits = self.model.unembed(torch.cat(done)).float().numpy() if done else None
        pieces: list[Floats | None] = []
        row = 0
        for work, each in zip(works, arrived, strict=True):
            if each is None or logits is None:
                pieces.append(None)
                continue
            pieces.append(logits[row : row + len(each.hidden_TD)])
            row += len(each.hidden_TD)
            if each.batch.expert_ids_LTK is not None:
                traces.update(_traces([work], each.batch))
            self._drop_features(work.sequence, work.start + work.count)
        return pieces

    def forget(self, sequence: Sequence) -> None:
        if self.patient is not None:
            self.patient.forget(sequence.request.request_id)
        self._tracks.pop(sequence.request.request_id, None)
        self._swapped.pop(sequence.request.request_id, None)

    def reset(self) -> None:
        self.features.clear()

    def counters(self) -> dict[str, int]:
        return {
            "media_encoded": self.features.num_encoded,
            "feature_hits": self.features.num_hits,
            "feature_bytes": self.features.num_bytes,
            "kv_bytes": self.cache.num_bytes,
            "swapped": len(self._swapped),
            **(self.residency.gauges() if self.residency else {}),
            **({"expert_stops": self.patient.num_stops} if self.patient else {}),
        }

    def _track(self, sequence: Sequence) -> Track:
        name = sequence.request.request_id
        track = self._tracks.get(name)
        if track is None:
            track = self._tracks[name] = Track(sequence.request)
        return track

    def _features(self, medium: MediaBlob, adapter: str) -> torch.Tensor:
        grid = Grid(*medium.grid)

        def encode() -> torch.Tensor:
            patches = np.frombuffer(medium.patches, dtype=np.uint8).reshape(grid.num_patches, -1)
            return self.model.encode(torch.from_numpy(normalize(patches)), [grid])

        own = adapter.encode() if self.adapters.touches_vision(adapter) else b""
        return self.features.get(medium.content_hash + own, encode)

    def _drop_features(self, sequence: Sequence, stop: int) -> None:
        track = self._tracks[sequence.request.request_id]
        if not track.features:
            return
        for index in list(track.features):
            if track.media[index].start + track.media[index].num_tokens <= stop:
                del track.features[index]


def _traces(works: Seq[Work], batch: Batch) -> dict[str, ExpertTrace]:
    assert batch.expert_ids_LTK is not None, "nobody asked for experts"
    ids_TLK = batch.expert_ids_LTK.to(torch.uint8).transpose(0, 1).numpy()
    is_vision_T = np.zeros(len(ids_TLK), np.uint8)
    is_vision_T[batch.vision_rows.numpy()] = 1
    traces, row = {}, 0
    for work in works:
        part = slice(row, row + work.count)
        row += work.count
        request = work.sequence.request
        if request.params.return_experts:
            ids = ids_TLK[part]
            shape = ids.shape[1], ids.shape[2]
            traces[request.request_id] = ExpertTrace(
                work.start, *shape, ids.tobytes(), is_vision_T[part].tobytes()
            )
    return traces
