"""Under a cap experts are read from disk: the same answers, and nobody waits for another's experts."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duomo.checkpoints import hot_experts, load_model
from duomo.checkpoints.inventory import VISION_PARTS
from duomo.checkpoints.pages import Range, bring_in
from duomo.checkpoints.residency import EXPERT_PARTS, Residency
from duomo.engine.engine import Engine, build_engine
from duomo.engine.request import Output
from duomo.engine.runner import ModelRunner
from duomo.model import BankConfig
from duomo.quant.synth import synthesize
from tests.checkpoints.test_residency import CONFIG as SMALL
from tests.engine.worlds import GREEDY, VOCABULARY, answers, picture_request, text_request, tokens

CONFIG = replace(SMALL, text_experts=BankConfig(32, 128), vision_experts=BankConfig(32, 128))
EXPERT_BYTES = 3 * 128 * 256 // 4 + 2 * (2 * 128 + 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("capped")
    synthesize(CONFIG, path, skew=0.65)
    return path


class World:
    """An engine over a fresh mapping of the folder, capped at so many experts or not at all."""

    def __init__(
        self, folder: Path, num_experts: int | None, is_strict: bool = False, **options: int
    ) -> None:
        options = {"num_pages": 256, "page_size": 8} | options
        self.runner = ModelRunner(load_model(folder), options["num_pages"], options["page_size"])
        self.residency = self.runner.residency = Residency(self.runner.model)
        if num_experts is not None:
            pools = self.residency.pools.values()
            fixed = sum(p.num_bytes for p in pools if p.name not in (*EXPERT_PARTS, *VISION_PARTS))
            self.runner.set_cap(fixed + num_experts * EXPERT_BYTES, is_strict)
        self.engine: Engine = build_engine(self.runner, VOCABULARY, **options)


@pytest.fixture
def world(folder: Path) -> Iterator[type[World]]:
    made: list[World] = []

    class Kept(World):
        def __init__(self, num_experts: int | None, **options: Any) -> None:
            super().__init__(folder, num_experts, **options)
            made.append(self)

    yield Kept
    for each in made:
        each.residency.close()


def test_a_cap_changes_no_answer(world: type[World]) -> None:
    """With pictures too, when the tower alone is more than the cap: what a step needs is let in."""
    requests = [
        picture_request(f"r{i}", i) if i % 3 == 0 else text_request(f"r{i}", i, 5 + 9 * i) for i in range(5)
    ]
    expected = answers(world(None, has_prefix_cache=False).engine, requests)
    for options in ({}, {"max_step_tokens": 13}, {"num_pages": 24}, {"num_drafts": 3}):
        capped = world(40, **options)
        assert answers(capped.engine, requests) == expected, options
        assert capped.runner.counters()["expert_stops"] > 0
        hot = capped.residency.hot
        assert hot is not None and hot.num_misses > 0 and hot.num_hits > 0


def test_the_cap_is_held(tmp_path: Path) -> None:
    """By what is mapped, with experts far larger than what a fault maps around itself."""
    bank = BankConfig(16, 2048)
    synthesize(replace(CONFIG, text_experts=bank, vision_experts=bank, shared_size=2048), tmp_path)
    size = 16 * EXPERT_BYTES - 15 * 2 * 256  # the scales of `down` are no more than before
    capped = World(tmp_path, num_experts=10 * size // EXPERT_BYTES, is_strict=True)
    hot = capped.residency.hot
    assert hot is not None
    answers(capped.engine, [text_request(f"r{i}", i, 1) for i in range(4)])
    hot.pinned = frozenset()
    capped.residency.tidy(idle_s=60)
    capped.residency.close()
    assert 0 < hot.held_bytes <= 10 * size < 0.4 * hot.num_reads * size
    mapped = sum(int(capped.residency.report()[part]["resident_bytes"] or 0) for part in EXPERT_PARTS)
    assert mapped <= 1.3 * 10 * size


def test_nobody_waits_for_anothers_experts(world: type[World], monkeypatch: pytest.MonkeyPatch) -> None:
    """B's experts never arrive while the disk stands still; A, whose experts are there, is answered."""
    is_open = threading.Event()
    is_open.set()

    def slowly(ranges: Iterable[Range]) -> None:
        is_open.wait(60)
        bring_in(ranges)

    monkeypatch.setattr(hot_experts, "bring_in", slowly)
    own = world(2 * 3 * 32, has_prefix_cache=False)
    params = replace(GREEDY, max_tokens=6)
    first = text_request("a", 1, 4, params=params)
    expected = answers(own.engine, [first])["a"]
    other = text_request("b", 2, 40, params=params)
    is_open.clear()
    heard: dict[str, list[Output]] = {"again": [], "b": []}
    own.engine.submit(other, heard["b"].append)
    own.engine.submit(replace(first, request_id="again"), heard["again"].append)
    for _ in range(40):
        own.engine.step()
        if heard["again"] and heard["again"][-1].finish_reason:
            break
    assert tokens(heard["again"]) == expected, "A was held up"
    assert not tokens(heard["b"]), "B had what it needed: the test shows nothing"
    is_open.set()
    while own.engine.step():
        pass
    assert tokens(heard["b"]) == answers(world(None).engine, [other])["b"]


def test_the_experts_most_used_stay(world: type[World]) -> None:
    own = world(64)
    answers(own.engine, [text_request(f"r{i}", i, 30) for i in range(12)])
    hot = own.residency.hot
    assert hot is not None
    banks = own.residency.banks
    counts = {(name, i): int(bank.counts[i]) for name, bank in banks.items() for i in range(32)}
    kept = [counts[expert] for expert in hot.held]
    gone = [count for expert, count in counts.items() if expert not in hot.held and count]
    assert sum(kept) / len(kept) > 1.5 * sum(gone) / len(gone)


def test_a_cancelled_request_leaves_nothing_behind(
    world: type[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open = threading.Event()
    monkeypatch.setattr(hot_experts, "bring_in", lambda ranges: is_open.wait(60))
    own = world(40)
    own.engine.submit(text_request("a", 1, 20), lambda output: None)
    own.engine.step()
    assert own.runner.patient is not None and own.runner.patient._stopped
    own.engine.cancel("a")
    own.engine.step()
    is_open.set()
    assert not own.runner.patient._stopped and own.engine.scheduler.pool.num_held == 0
