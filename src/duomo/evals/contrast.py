"""What thinking is worth: the same questions asked with and without it, over the kinds where steps matter.

The difference of two shares has Newcombe's interval, which is made of Wilson's two and needs no normality.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from duomo.evals.embedded import Score, wilson

# The three together, as the aim is stated: sums of digits, totals and differences of charts, circuits.
REASONED = ("digits/sum", "charts/total", "charts/difference", "circuits/equivalent")


@dataclass(frozen=True, slots=True)
class Contrast:
    """Right answers without (`direct`) and with thinking, of how many each."""

    direct: tuple[int, int]
    thinking: tuple[int, int]

    @property
    def gain(self) -> float:
        return self.thinking[0] / self.thinking[1] - self.direct[0] / self.direct[1]

    def interval(self) -> tuple[float, float]:
        """95 %, Newcombe's hybrid score (method 10)."""
        shares = [right / num for right, num in (self.thinking, self.direct)]
        (low1, high1), (low2, high2) = wilson(*self.thinking), wilson(*self.direct)
        return (
            self.gain - math.hypot(shares[0] - low1, high2 - shares[1]),
            self.gain + math.hypot(high1 - shares[0], shares[1] - low2),
        )

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval()
        return {
            "direct": list(self.direct),
            "thinking": list(self.thinking),
            "gain": round(self.gain, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }


def contrasts(scores: Mapping[str, Score]) -> dict[str, Contrast]:
    """Every kind that was asked both ways, and `reasoned`: the ones of REASONED together."""
    found = {}
    for kind, score in scores.items():
        thinking = scores.get(f"{kind} thinking")
        if thinking is not None:
            found[kind] = Contrast((score.right, score.num), (thinking.right, thinking.num))
    chosen = [found[kind] for kind in REASONED if kind in found]
    if chosen:
        found["reasoned"] = Contrast(_added(c.direct for c in chosen), _added(c.thinking for c in chosen))
    return found


def _added(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    rights, nums = zip(*pairs, strict=True)
    return sum(rights), sum(nums)
