"""Which weights stay in memory: pools by modality, asked for early, let go when idle, capped on demand.

A packed model reads its file's own pages, so text alone never brings in a vision expert, the tower or the
resampler. `expect_picture` starts reading those the moment a picture arrives; `let_go_idle` gives them up
after a while, and sooner when the machine is short of memory; `cap` keeps the experts that live routing
chooses most and has the others read when they are chosen (`hot_experts`). All of it is advice about clean
file pages: nothing is ever lost, and a wrong guess costs one read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from duomo.checkpoints.hot_experts import Bank, HotExperts
from duomo.checkpoints.inventory import VISION_PARTS, part_of
from duomo.checkpoints.pages import Range, ask_for, cached_bytes, let_go, mapped_bytes, whole_files
from duomo.checkpoints.pressure import is_short_of_memory
from duomo.kernels import IntWeight, TrellisWeight
from duomo.model import Ernie
from duomo.model.packed_layers import PackedExperts
from duomo.trellis import TrellisBank

EXPERT_PARTS = ("text experts", "vision experts")
HELD_S = 1.0
PRESSED_IDLE_S = 10.0
"""Idle pools go this soon when the machine is short of memory."""


@dataclass
class Pool:
    """The packed weights of one part; `plain` is what else of the file only they need, such as a router."""

    name: str
    ranges: list[Range] = field(default_factory=list)
    plain: list[Range] = field(default_factory=list)
    last_used: float | None = None

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.ranges)


class Residency:
    """Of one packed model. Plain weights (routers, norms, biases) are not counted.

    `after_letting_go` is called when pools have gone: less of the process is in use then than just its
    weights. `clock` and `is_pressed` are for tests. Methods may be called from any thread: they read counts
    and give advice.
    """

    def __init__(
        self,
        model: Ernie,
        clock: Callable[[], float] = time.monotonic,
        is_pressed: Callable[[], bool] = is_short_of_memory,
    ) -> None:
        self._clock, self._is_pressed = clock, is_pressed
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None
        self.pools: dict[str, Pool] = {}
        self.banks: dict[str, Bank] = {}
        self.hot: HotExperts | None = None  # under a cap
        self.cap_bytes: int | None = None
        self.num_let_go = 0
        self.after_letting_go: Callable[[], None] = lambda: None
        self._held_at: float | None = None
        self._held: dict[str, int] = {}
        for name, module in model.named_modules():
            part = part_of(f"{name}.weight")
            for array in _arrays(module):
                self.pools.setdefault(part, Pool(part)).ranges.append(Range.of(array))
            if isinstance(module, PackedExperts):
                self._watch_bank(name, module)
                plain = (x.detach().numpy() for x in module.router.parameters())
                self.pools[part].plain += [Range.of(array) for array in plain]
        # Loading read headers, plain tensors and a piece or two more; none of it is needed any longer.
        let_go(whole_files(item for pool in self.pools.values() for item in pool.ranges))
        if model.vision_tower is not None:
            model.vision_tower.register_forward_pre_hook(lambda module, inputs: self._mark_vision())

    def expect_picture(self) -> None:
        """Starts reading everything a picture needs; returns at once. Call it before decoding the picture.

        Under a cap vision experts are not among it: they are read as they are chosen, like the others.
        """
        self._mark_vision()
        for part in VISION_PARTS:
            if part in self.pools and not (self.hot and part in EXPERT_PARTS):
                ask_for(self.pools[part].ranges)

    def let_go_idle(self, idle_s: float) -> list[str]:
        """Gives up the vision pools not used for `idle_s` seconds. Returns the names of those given up."""
        gone = []
        for part in VISION_PARTS:
            pool = self.pools.get(part)
            if pool and pool.last_used is not None and self._clock() - pool.last_used >= idle_s:
                pool.last_used = None
                if not (self.hot and part in EXPERT_PARTS):  # there the cap decides
                    let_go(pool.ranges + pool.plain)
                gone.append(part)
        self.num_let_go += len(gone)
        if gone:
            self.after_letting_go()
        return gone

    def cap(self, cap_bytes: int, is_strict: bool = False) -> HotExperts:
        """Holds weights to `cap_bytes` from now on: what is no routed expert stays, experts share the rest.

        The caller's forward pass must bring experts in by `hot` before it computes; one that does not reads
        them page by page, slowly but rightly. `is_strict`: what goes leaves the system's cache too.
        """
        assert self.hot is None, "already capped"
        self.cap_bytes = cap_bytes
        self.hot = HotExperts(self.banks, lambda: cap_bytes - self._fixed_bytes(), is_strict)
        return self.hot

    def tidy(self, idle_s: float) -> list[str]:
        """What the keeper does now and then: lets idle pools go, sooner under pressure, and holds the cap."""
        gone = self.let_go_idle(min(idle_s, PRESSED_IDLE_S) if self._is_pressed() else idle_s)
        if self.hot is not None:
            self.hot.shrink()
            self.hot.forget_a_little()
        return gone

    def keep(self, idle_s: float, period_s: float = 5.0) -> None:
        """Calls `tidy` from a thread of its own until `close`."""
        assert self._keeper is None, "already kept"

        def watch() -> None:
            while not self._closed.wait(period_s):
                self.tidy(idle_s)

        self._keeper = threading.Thread(target=watch, name="duomo-residency", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        self._closed.set()
        if self._keeper is not None:
            self._keeper.join()
        if self.hot is not None:
            self.hot.close()

    def report(self) -> dict[str, dict[str, Any]]:
        """By part: bytes in the file, held by this process, cached by the system; seconds since use."""
        return {
            pool.name: {
                "bytes": pool.num_bytes,
                "resident_bytes": mapped_bytes(pool.ranges),
                "cached_bytes": cached_bytes(pool.ranges),
                "idle_s": None if pool.last_used is None else round(self._clock() - pool.last_used, 1),
            }
            for pool in self.pools.values()
        }

    def gauges(self) -> dict[str, int]:
        """`resident_text_experts_bytes` and so on: what this process holds; and the cap's work."""
        values = dict(self._held_bytes())
        values["pools_let_go"] = self.num_let_go
        if self.hot is not None and self.cap_bytes is not None:
            values |= {
                "weights_cap_bytes": self.cap_bytes,
                "expert_held_bytes": self.hot.held_bytes,
                "expert_read_bytes": self.hot.read_bytes,
                "expert_hits": self.hot.num_hits,
                "expert_misses": self.hot.num_misses,
            }
        return values

    def _held_bytes(self) -> dict[str, int]:
        """Asked of the system once a second at most: it answers for every page, two millions of the 28B."""
        now = self._clock()
        if self._held_at is None or now - self._held_at >= HELD_S:
            self._held_at = now
            self._held = {
                f"resident_{pool.name.replace(' ', '_')}_bytes": _held(pool.ranges)
                for pool in self.pools.values()
            }
        return self._held

    def routing_counts(self) -> dict[str, list[int]]:
        """How often each expert of each bank was chosen since the start."""
        return {name: bank.counts.tolist() for name, bank in self.banks.items()}

    def _fixed_bytes(self) -> int:
        """Of pools that stay whole: all but experts, those for pictures only while they are in use."""
        return sum(
            pool.num_bytes
            for pool in self.pools.values()
            if pool.name not in EXPERT_PARTS and (pool.name not in VISION_PARTS or pool.last_used is not None)
        )

    def _mark_vision(self) -> None:
        for part in VISION_PARTS:
            if part in self.pools:
                self.pools[part].last_used = self._clock()

    def _watch_bank(self, name: str, module: PackedExperts) -> None:
        halves = module.gate_up.stored, module.down.stored
        assert isinstance(halves[0], TrellisBank) and isinstance(halves[1], TrellisBank)
        count = halves[0].shape[0]
        experts = [
            [Range.of(part) for half in halves for part in (half.codes[e], half.row_scale[e])]
            for e in range(count)
        ]
        bank = self.banks[name] = Bank.of(experts)
        part = part_of(f"{name}.weight")

        def count_choices(expert_ids_TK: Tensor) -> None:
            if part in VISION_PARTS:  # a long prompt needs them long after the tower
                self.pools[part].last_used = self._clock()
            bank.count(np.bincount(expert_ids_TK.flatten().numpy(), minlength=count))

        module.listener = count_choices


def residency_of(model: Ernie) -> Residency | None:
    """None for a model whose weights are not packed: those are ordinary memory, all of it resident."""
    residency = Residency(model)
    return residency if residency.pools else None


def _held(ranges: list[Range]) -> int:
    mapped = mapped_bytes(ranges)
    return sum(item.num_bytes for item in ranges) if mapped is None else mapped


def _arrays(module: nn.Module) -> Iterator[npt.NDArray[Any]]:
    """The packed arrays of one module, as they lie in the file."""
    for value in vars(module).values():
        for weight in value if isinstance(value, tuple) else (value,):
            if isinstance(weight, IntWeight | TrellisWeight):
                yield weight.stored.codes
                yield weight.stored.row_scale
