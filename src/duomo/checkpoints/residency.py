"""Which weights stay in memory: pools by modality, asked for early, let go when idle, capped on demand.

A packed model reads its file's own pages, so text alone never brings in a vision expert, the tower or the
resampler. `expect_picture` starts reading those the moment a picture arrives; `let_go_idle` gives them up
after a while; `enforce_cap` keeps the experts that live routing chose most. All of it is advice about clean
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

from duomo.checkpoints.inventory import VISION_PARTS, part_of
from duomo.checkpoints.pages import Range, ask_for, cached_bytes, let_go, mapped_bytes
from duomo.kernels import Int8Weight, TrellisWeight
from duomo.model import Ernie
from duomo.model.packed import PackedExperts
from duomo.trellis import TrellisBank


@dataclass
class Pool:
    """The packed weights of one part."""

    name: str
    ranges: list[Range] = field(default_factory=list)
    last_used: float | None = None

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.ranges)


@dataclass
class _Bank:
    """A bank's experts one by one, and how often each was chosen."""

    experts: list[list[Range]]
    counts: npt.NDArray[np.int64]


class Residency:
    """Of one packed model. Plain weights (routers, norms, biases) are ordinary memory and not counted.

    `clock` is for tests. Methods may be called from any thread: they read counts and give advice.
    """

    def __init__(self, model: Ernie, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None
        self.pools: dict[str, Pool] = {}
        self._banks: dict[str, _Bank] = {}
        for name, module in model.named_modules():
            part = part_of(f"{name}.weight")
            for array in _arrays(module):
                self.pools.setdefault(part, Pool(part)).ranges.append(Range.of(array))
            if isinstance(module, PackedExperts):
                self._watch_bank(name, module)
        for part in VISION_PARTS:  # loading unpacked a piece or two; give back what came with them
            if part in self.pools:
                let_go(self.pools[part].ranges)
        if model.vision_tower is not None:
            model.vision_tower.register_forward_pre_hook(lambda module, inputs: self._mark_vision())

    def expect_picture(self) -> None:
        """Starts reading everything a picture needs; returns at once. Call it before decoding the picture."""
        self._mark_vision()
        for part in VISION_PARTS:
            if part in self.pools:
                ask_for(self.pools[part].ranges)

    def let_go_idle(self, idle_s: float) -> list[str]:
        """Gives up the vision pools not used for `idle_s` seconds. Returns the names of those given up."""
        gone = []
        for part in VISION_PARTS:
            pool = self.pools.get(part)
            if pool and pool.last_used is not None and self._clock() - pool.last_used >= idle_s:
                let_go(pool.ranges)
                pool.last_used = None
                gone.append(part)
        return gone

    def enforce_cap(self, cap_bytes: int) -> int:
        """Lets go of the least chosen experts while pools hold more than `cap_bytes`; returns bytes freed.

        Everything but routed experts stays, so a cap below that has no further effect. Where the system
        does not tell what is in memory, all ranges count as held.
        """
        held = sum(_held(pool.ranges) for pool in self.pools.values())
        freed = 0
        victims: list[Range] = []
        for _, ranges in sorted(self._experts(), key=lambda item: item[0]):
            if held - freed <= cap_bytes:
                break
            size = _held(ranges)
            victims += ranges
            freed += size
        let_go(victims)
        return freed

    def keep(self, idle_s: float, cap_bytes: int | None = None, period_s: float = 5.0) -> None:
        """Lets go of what is idle, and holds to the cap, from a thread of its own until `close`."""
        assert self._keeper is None, "already kept"

        def watch() -> None:
            while not self._closed.wait(period_s):
                self.let_go_idle(idle_s)
                if cap_bytes is not None:
                    self.enforce_cap(cap_bytes)

        self._keeper = threading.Thread(target=watch, name="duomo-residency", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        self._closed.set()
        if self._keeper is not None:
            self._keeper.join()

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
        """`resident_text_experts_bytes` and so on: what this process holds of each part."""
        return {
            f"resident_{pool.name.replace(' ', '_')}_bytes": _held(pool.ranges)
            for pool in self.pools.values()
        }

    def routing_counts(self) -> dict[str, list[int]]:
        """How often each expert of each bank was chosen since the start."""
        return {name: bank.counts.tolist() for name, bank in self._banks.items()}

    def _experts(self) -> Iterator[tuple[int, list[Range]]]:
        for bank in self._banks.values():
            yield from zip(bank.counts.tolist(), bank.experts, strict=True)

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
        bank = self._banks[name] = _Bank(experts, np.zeros(count, np.int64))

        def count_choices(expert_ids_TK: Tensor) -> None:
            bank.counts += np.bincount(expert_ids_TK.flatten().numpy(), minlength=count)

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
            if isinstance(weight, Int8Weight):
                yield weight.stored.levels
            elif isinstance(weight, TrellisWeight):
                yield weight.stored.codes
            else:
                continue
            yield weight.stored.row_scale
