"""Random schedules against a shadow cache: no page lost or shared wrongly, nobody starved, answers unchanged.

The shadow writes into every slot what belongs there (id, position, picture, salt, adapter) and checks at
every step that a request finds its whole prefix in its pages. Adapters are loaded anew under their names
while requests run: each keeps the one it began with. Invariants of pool and scheduler hold after every step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duomo.engine.adapters import Adapters, _Loaded
from duomo.engine.engine import Engine, build_engine
from duomo.engine.request import MediaBlob, Output, Request, SamplingParams
from duomo.engine.runner import Floats
from duomo.engine.scheduler import Sequence, Step
from duomo.engine.vocabulary import Vocabulary

V = 12
END = 1
VOCABULARY = Vocabulary([bytes([97 + i]) for i in range(V)], (END,), None)


def next_id(ids: Seq[int], media: bytes) -> int:
    """A rule that depends on everything before, so that one wrong slot changes the answer."""
    total = sum((place + 3) * token for place, token in enumerate(ids)) + sum(media)
    return 2 + total % (V - 2) if total % 17 else END


NAMES = ("a", "b")


def content(request: Request) -> bytes:
    """What the answer depends on beside the ids."""
    return b"".join(m.content_hash for m in request.media) + request.adapter.encode()


class ShadowAdapters(Adapters):
    """Names without weights; `load_anew` puts another adapter under a name."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.load_anew(name)

    def load_anew(self, name: str) -> None:
        if name in self.names():
            self.unload(name)
        self._generation = getattr(self, "_generation", 0) + 1
        identity = f"{name}:{self._generation}"
        self._identity[name], self._loaded[identity] = identity, _Loaded((), False)


class ShadowRunner:
    vocab_size = V

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.adapters = ShadowAdapters()
        self.residency = None
        self.slots: list[tuple[int, int, bytes] | None] = [None] * (num_pages * page_size)
        self.swapped: dict[str, list[tuple[int, int, bytes] | None]] = {}

    def entry(self, sequence: Sequence, ids: Seq[int], place: int) -> tuple[int, int, bytes]:
        media = sequence.request.media
        inside = [m.content_hash for m in media if m.start <= place < m.start + m.num_tokens]
        own = f"/{sequence.request.salt}/{sequence.request.adapter}"
        return (ids[place], place, b"".join(inside) + own.encode())

    def slot(self, sequence: Sequence, place: int) -> int:
        return sequence.pages[place // self.page_size] * self.page_size + place % self.page_size

    def pages(self, pages: list[int]) -> list[int]:
        return [page * self.page_size + i for page in pages for i in range(self.page_size)]

    def execute(self, step: Step, logit_starts: Seq[int]) -> list[Floats]:
        for sequence, pages in step.swap_out:
            self.swapped[sequence.request.request_id] = [self.slots[s] for s in self.pages(pages)]
        for sequence, pages in step.swap_in:
            saved = self.swapped.pop(sequence.request.request_id)
            assert len(saved) == len(pages) * self.page_size
            for slot, value in zip(self.pages(pages), saved, strict=True):
                self.slots[slot] = value
        pieces = []
        for work in step.works:
            ids = [*work.sequence.ids, *work.drafts]
            for place in range(work.start, work.start + work.count):
                self.slots[self.slot(work.sequence, place)] = self.entry(work.sequence, ids, place)
        for work, first in zip(step.works, logit_starts, strict=True):
            ids = [*work.sequence.ids, *work.drafts]
            for place in range(work.start + work.count):
                found = self.slots[self.slot(work.sequence, place)]
                assert found == self.entry(work.sequence, ids, place), "a request reads another's keys"
            logits = np.zeros((work.count - first, V), dtype=np.float32)
            request = work.sequence.request
            assert not request.adapter or request.adapter in self.adapters._loaded, (
                "an adapter in use is gone"
            )
            media = content(request)
            for row in range(work.count - first):
                logits[row, next_id(ids[: work.start + first + row + 1], media)] = 1
            pieces.append(logits)
        return pieces

    def forget(self, sequence: Sequence) -> None:
        self.swapped.pop(sequence.request.request_id, None)

    def reset(self) -> None: ...

    def counters(self) -> dict[str, int]:
        return {}


def expected(request: Request, limit: int) -> list[int]:
    ids, media = list(request.ids), content(request)
    most = min(request.params.max_tokens or limit, limit - len(request.ids))
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != END):
        answer.append(next_id([*ids, *answer], media))
    return answer


@st.composite
def requests(draw: st.DrawFn, index: int) -> Request:
    shared = draw(st.integers(0, 3))
    head = [2 + (shared + i) % 4 for i in range(draw(st.integers(1, 20)))]
    tail = draw(st.lists(st.integers(2, 5), max_size=8))
    media: tuple[MediaBlob, ...] = ()
    ids = head + tail
    if draw(st.integers(0, 3)) == 0:
        picture = bytes([draw(st.integers(0, 2))])
        media = (MediaBlob("image", len(head), (1, 2, 6), picture, b""),)
        ids = [*head, 6, 6, 6, *tail]
    params = SamplingParams(temperature=0, max_tokens=draw(st.integers(1, 14)), thinking="off")
    return Request(
        f"r{index}", tuple(ids), params, media,
        priority=draw(st.integers(0, 2)), salt=draw(st.sampled_from(["", "", "s"])),
        adapter=draw(st.sampled_from(["", "", *NAMES])),
    )  # fmt: skip


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, object]]]:
    options = {
        "num_pages": draw(st.integers(12, 24)),
        "page_size": draw(st.sampled_from([4, 5])),
        "max_sequences": draw(st.integers(1, 6)),
        "max_step_tokens": draw(st.sampled_from([1, 3, 8, 64])),
        "num_drafts": draw(st.sampled_from([0, 0, 3])),
    }
    events: list[tuple[str, object]] = []
    for index in range(draw(st.integers(1, 12))):
        events.append(("add", draw(requests(index))))
        events += [("step", None)] * draw(st.integers(0, 4))
        if draw(st.integers(0, 4)) == 0:
            events.append(("cancel", f"r{draw(st.integers(0, index))}"))
        if draw(st.integers(0, 9)) == 0:
            events.append(("reset", None))
        if draw(st.integers(0, 5)) == 0:
            events.append(("load", draw(st.sampled_from(NAMES))))
    return options, events


def run(schedule: tuple[dict[str, int], list[tuple[str, object]]]) -> Engine:
    options, events = schedule
    runner = ShadowRunner(options["num_pages"], options["page_size"])
    engine = build_engine(runner, VOCABULARY, **options)
    outputs: dict[str, list[Output]] = {}
    asked: dict[str, Request] = {}
    cancelled: set[str] = set()
    for kind, value in events:
        if kind == "add":
            assert isinstance(value, Request)
            identity = runner.adapters._identity.get(value.adapter, "")
            asked[value.request_id], outputs[value.request_id] = replace(value, adapter=identity), []
            engine.submit(value, outputs[value.request_id].append)
        elif kind == "cancel":
            cancelled.add(str(value))
            engine.cancel(str(value))
        elif kind == "load":
            runner.adapters.load_anew(str(value))
        elif kind == "reset":
            engine.reset_caches()
        else:
            engine.step()
        engine.scheduler.check()
    for _ in range(3000):
        if not engine.step():
            break
        engine.scheduler.check()
    for name, request in asked.items():
        assert outputs[name] and outputs[name][-1].finish_reason, f"{name} was starved"
        assert [o.finish_reason for o in outputs[name][:-1]] == [None] * (len(outputs[name]) - 1)
        answer = [token for output in outputs[name] for token in output.token_ids]
        wanted = expected(request, engine.scheduler.max_model_tokens)
        if name in cancelled:
            assert answer == wanted[: len(answer)]
        else:
            assert answer == wanted
    assert engine.scheduler.pool.num_held == 0 and not runner.swapped
    assert len(runner.adapters._loaded) == len(NAMES) and not any(runner.adapters._users.values())
    return engine


_SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, **_SETTINGS)  # type: ignore[arg-type]
@given(schedules())
def test_a_hundred_random_schedules(schedule: tuple[dict[str, int], list[tuple[str, object]]]) -> None:
    run(schedule)


@pytest.mark.slow
@settings(max_examples=1000, **_SETTINGS)  # type: ignore[arg-type]
@given(schedules())
def test_a_thousand_random_schedules(schedule: tuple[dict[str, int], list[tuple[str, object]]]) -> None:
    run(schedule)


def test_the_important_come_first_and_preemption_does_happen() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, thinking="off", ignore_eos=True)
    events: list[tuple[str, object]] = []
    order: list[str] = []
    engine = build_engine(ShadowRunner(8, 4), VOCABULARY, num_pages=8, page_size=4)
    for index, priority in enumerate([5, 5, 0]):
        request = Request(f"r{index}", (3 + index,) * 9, params, priority=priority)
        engine.submit(request, lambda out: order.append(out.request_id) if out.finish_reason else None)
        engine.step()
    while engine.step():
        engine.scheduler.check()
    assert order[0] == "r2" and engine.scheduler.num_preemptions > 0 and not events
