"""Experts under a cap: which are in memory, which are read next, which must go.

Counts of live routing, halved now and then, say who is wanted; the least wanted make room. A thread of its
own reads what was asked for, so whoever computes may go on with something else: ask `missing`, then
`ask_for`, and come back after `wait`. Experts in `pinned` are somebody's next step and are never given up.
One more than fits is let in rather than refused: a cap below what one step needs is overrun, not a
deadlock. What is given up leaves this process; the system may keep it cached while nobody else wants the
memory, unless `is_strict`, which measures a machine that has no more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from duomo.checkpoints.pages import Range, bring_in, drop, expect_single_reads, file_mappings, let_go

Expert = tuple[str, int]  # the bank's name, the number in it
HALF_LIFE = 200_000  # choices after which counts are halved: about 1,200 tokens of the 28B
_AT_ONCE = 8  # experts given up beyond what is needed, so that not every read has to make room


@dataclass(slots=True)
class Bank:
    """Ranges of a bank's experts one by one, and how often each was chosen: ever, and of late."""

    experts: list[list[Range]]
    counts: npt.NDArray[np.int64]
    recent: npt.NDArray[np.float64]

    @classmethod
    def of(cls, experts: list[list[Range]]) -> Bank:
        count = len(experts)
        return cls(experts, np.zeros(count, np.int64), np.zeros(count))

    def size(self, index: int) -> int:
        return sum(item.num_bytes for item in self.experts[index])

    def count(self, choices: npt.NDArray[np.int64]) -> None:
        self.counts += choices
        self.recent += choices


class HotExperts:
    """Holds experts of `banks` up to `budget()` bytes. Methods may be called from any thread."""

    def __init__(self, banks: dict[str, Bank], budget: Callable[[], int], is_strict: bool = False) -> None:
        self.banks, self._budget, self._is_strict = banks, budget, is_strict
        self._mappings = file_mappings()
        self.held: set[Expert] = set()
        self.pinned: frozenset[Expert] = frozenset()
        self.held_bytes = self.read_bytes = self.num_reads = self.num_hits = self.num_misses = 0
        self._asked: deque[Expert] = deque()
        self._reading: set[Expert] = set()
        self._changed = threading.Condition()
        self._is_closed = False
        everything = [item for bank in banks.values() for expert in bank.experts for item in expert]
        expect_single_reads(everything)
        self._give_up(everything)
        self._reader = threading.Thread(target=self._read_on, name="duomo-experts", daemon=True)
        self._reader.start()

    def missing(self, name: str, expert_ids: Iterable[int]) -> list[Expert]:
        """Those of a bank that are not in memory; all of them are pinned."""
        wanted = [(name, index) for index in expert_ids]
        with self._changed:
            self.pinned |= frozenset(wanted)
            missing = [expert for expert in wanted if expert not in self.held]
        self.num_misses += len(missing)
        self.num_hits += len(wanted) - len(missing)
        return missing

    def holds(self, experts: Iterable[Expert]) -> bool:
        with self._changed:
            return self.held.issuperset(experts)

    def ask_for(self, experts: Sequence[Expert]) -> None:
        """Has them read, after what was asked for before; returns at once."""
        with self._changed:
            for expert in experts:
                if expert not in self.held and expert not in self._reading and expert not in self._asked:
                    self._asked.append(expert)
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Until another expert is in memory, or the time is over, or nothing is being read."""
        with self._changed:
            before = self.num_reads
            self._changed.wait_for(
                lambda: self.num_reads > before or not (self._asked or self._reading), timeout_s
            )

    def shrink(self) -> int:
        """Gives up what is over the budget (a picture may have come). Returns bytes freed."""
        with self._changed:
            return self._make_room(0)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._reader.join()

    def _read_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._is_closed)
                if self._is_closed:
                    return
                expert = self._asked.popleft()
                self._reading.add(expert)
                size = self.banks[expert[0]].size(expert[1])
                self._make_room(size)
                self.held_bytes += size
            bring_in(self.banks[expert[0]].experts[expert[1]])
            with self._changed:
                self._reading.discard(expert)
                self.held.add(expert)
                self.num_reads += 1
                self.read_bytes += size
                self._changed.notify_all()

    def _make_room(self, size: int) -> int:
        """Gives up the least wanted until `size` more bytes fit, or only pinned ones are left."""
        over = self.held_bytes + size - self._budget()
        if over <= 0:
            return 0
        freed, ranges = 0, []
        for expert in sorted(self.held - self.pinned, key=self._wanted):
            if freed >= over + _AT_ONCE * size:
                break
            self.held.discard(expert)
            freed += self.banks[expert[0]].size(expert[1])
            ranges += self.banks[expert[0]].experts[expert[1]]
        self._give_up(ranges)
        self.held_bytes -= freed
        return freed

    def _give_up(self, ranges: list[Range]) -> None:
        (drop if self._is_strict else let_go)(ranges, self._mappings)

    def _wanted(self, expert: Expert) -> float:
        """Choices of late for each byte: a text expert of the 28B is three times a vision expert."""
        bank = self.banks[expert[0]]
        return float(bank.recent[expert[1]]) / bank.size(expert[1])

    def forget_a_little(self) -> None:
        """Halves the counts of late where enough has been chosen since, so that favourites may change."""
        if sum(float(bank.recent.sum()) for bank in self.banks.values()) > HALF_LIFE:
            for bank in self.banks.values():
                bank.recent /= 2
