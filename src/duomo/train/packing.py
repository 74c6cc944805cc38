"""Samples into packs: best fit by tokens and patches. A sample is never cut, so neither is a picture.

A pack is a list of whole sequences that one forward pass computes side by side. They cannot see each other:
attention runs a sequence at a time and positions begin anew, so a packed gradient is the unpacked one. With
no padding row anywhere, what packing saves is passes, and what it wastes is room under the budget.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duomo.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Budget:
    """What one pack may hold."""

    tokens: int
    patches: int


@dataclass(frozen=True, slots=True)
class PackStatistics:
    """How full packs are, and what they are full of."""

    num_packs: int
    num_samples: int
    tokens: int
    supervised: int
    patches: int
    empty_share: float  # of the token budget

    def line(self) -> str:
        return (
            f"{self.num_samples} samples in {self.num_packs} packs: {self.tokens:,} tokens, "
            f"{self.supervised:,} supervised, {self.patches:,} patches, {100 * self.empty_share:.1f} % empty"
        )


def pack(
    tokens: Sequence[int], patches: Sequence[int], budget: Budget, kind: str = "best_fit", seed: int = 0
) -> list[list[int]]:
    """Indices by pack, each sample once, in an order drawn from `seed`.

    best_fit puts the longest first, each into the pack with the least room that holds it; naive fills one
    pack after another in the order drawn; none gives each sample its own.
    """
    rng = np.random.default_rng(seed)
    order = [int(index) for index in rng.permutation(len(tokens))]
    for index in order:
        if tokens[index] > budget.tokens or patches[index] > budget.patches:
            raise TrainingError(
                f"a sample of {tokens[index]} tokens and {patches[index]} patches fits no pack of "
                f"{budget.tokens} and {budget.patches} (max_tokens, max_patches)"
            )
    if kind == "none":
        return [[index] for index in order]
    if kind == "naive":
        packs = _naive(order, tokens, patches, budget)
    else:
        packs = _best_fit(sorted(order, key=lambda i: -tokens[i]), tokens, patches, budget)
    return [packs[int(index)] for index in rng.permutation(len(packs))]


def _naive(
    order: list[int], tokens: Sequence[int], patches: Sequence[int], budget: Budget
) -> list[list[int]]:
    packs: list[list[int]] = []
    left = Budget(-1, -1)
    for index in order:
        if tokens[index] > left.tokens or patches[index] > left.patches:
            packs.append([])
            left = budget
        packs[-1].append(index)
        left = Budget(left.tokens - tokens[index], left.patches - patches[index])
    return packs


def _best_fit(
    order: list[int], tokens: Sequence[int], patches: Sequence[int], budget: Budget
) -> list[list[int]]:
    """`room` is sorted, so the tightest pack that holds a sample is the first one that is wide enough."""
    packs: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # tokens left, number of the pack, patches left
    for index in order:
        place = bisect_left(room, (tokens[index], -1, 0))
        while place < len(room) and room[place][2] < patches[index]:
            place += 1
        if place == len(room):
            packs.append([index])
            left = (budget.tokens - tokens[index], len(packs) - 1, budget.patches - patches[index])
        else:
            width, number, seen = room.pop(place)
            packs[number].append(index)
            left = (width - tokens[index], number, seen - patches[index])
        insort(room, left)
    return packs


def statistics(
    packs: Sequence[Sequence[int]],
    tokens: Sequence[int],
    patches: Sequence[int],
    supervised: Sequence[int],
    budget: Budget,
) -> PackStatistics:
    chosen = [index for one in packs for index in one]
    total = sum(tokens[index] for index in chosen)
    return PackStatistics(
        len(packs),
        len(chosen),
        total,
        sum(supervised[index] for index in chosen),
        sum(patches[index] for index in chosen),
        1 - total / (len(packs) * budget.tokens) if packs else 0.0,
    )


class PackOrder:
    """Pack number n of an endless run: a function of (seed, n) alone, so a resumed run needs only n."""

    def __init__(
        self, tokens: Sequence[int], patches: Sequence[int], budget: Budget, kind: str, seed: int
    ) -> None:
        self._lengths = tokens, patches
        self._budget, self._kind, self._seed = budget, kind, seed
        self._epoch, self._start = -1, 0
        self._packs: list[list[int]] = []

    def epoch(self, number: int) -> list[list[int]]:
        seed = int(np.random.default_rng([self._seed, number]).integers(1 << 62))
        return pack(*self._lengths, self._budget, self._kind, seed)

    def __getitem__(self, number: int) -> list[int]:
        if number < self._start:
            self._epoch, self._start, self._packs = -1, 0, []
        while number >= self._start + len(self._packs):
            self._start += len(self._packs)
            self._epoch += 1
            self._packs = self.epoch(self._epoch)
        return self._packs[number - self._start]
