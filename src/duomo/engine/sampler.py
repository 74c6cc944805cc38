"""One token from one row of logits. Numpy, row by row, so that a neighbour can have no influence.

Order: bans and bias, penalties, grammar, then temperature, top-k, top-p, min-p. The random number of token i
of a request is a function of its seed and i alone (Philox, counter i): the same seed gives the same answer
whatever runs beside it, after preemption and under speculation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from duomo.engine.request import SamplingParams, TokenLogprob

Floats = npt.NDArray[np.float64]
_NEVER = -np.inf


class Sampler:
    """Of one request: its parameters, what it has said, its random numbers."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], seed: int, bad: Sequence[tuple[int, ...]]
    ) -> None:
        self.params = params
        self._seed = seed & ((1 << 64) - 1)
        self._bad = tuple(words for words in bad if words)
        self._counts: Counter[int] = Counter()
        self._said: list[int] = []
        self._seen = set(prompt) if params.repetition_penalty != 1.0 else set()
        self._bias = (
            np.fromiter(params.logit_bias.keys(), dtype=np.int64),
            np.fromiter(params.logit_bias.values(), dtype=np.float64),
        )
        p = params
        self._is_plain = not (
            self._bad or p.logit_bias or p.presence_penalty or p.frequency_penalty
        ) and p.repetition_penalty == 1.0  # fmt: skip
        self.is_greedy = self._is_plain and p.temperature == 0  # the likeliest token, unless it is banned

    def draw(
        self,
        logits: npt.NDArray[np.float32],
        banned: Sequence[int],
        allowed: npt.NDArray[np.bool_] | None,
    ) -> int:
        if self.is_greedy and allowed is None:
            best = int(logits.argmax())
            if best in banned:
                kept = logits.copy()
                kept[list(banned)] = _NEVER
                best = int(kept.argmax())
            return best
        scores = self._adjust(logits.astype(np.float64), banned)
        if allowed is not None:
            short = np.zeros(len(scores), dtype=np.bool_)
            short[: len(allowed)] = allowed[: len(scores)]
            scores[~short] = _NEVER
        if self.params.temperature == 0:
            return int(scores.argmax())
        return self._pick(scores / self.params.temperature)

    def accept(self, token: int) -> None:
        self._said.append(token)
        if self._is_plain:
            return
        self._counts[token] += 1
        if self.params.repetition_penalty != 1.0:
            self._seen.add(token)

    def _adjust(self, scores: Floats, banned: Sequence[int]) -> Floats:
        p = self.params
        if p.repetition_penalty != 1.0 and self._seen:
            seen = np.fromiter(self._seen, dtype=np.int64)
            old = scores[seen]
            scores[seen] = np.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and self._counts:
            ids = np.fromiter(self._counts.keys(), dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float64)
            scores[ids] -= p.presence_penalty + p.frequency_penalty * counts
        ids, values = self._bias
        scores[ids] += values
        for words in self._bad:
            head = words[:-1]
            if not head or tuple(self._said[-len(head) :]) == head:
                scores[words[-1]] = _NEVER
        if len(banned):
            scores[list(banned)] = _NEVER
        return scores

    def _pick(self, scores: Floats) -> int:
        order, weights = candidates(scores, self.params)
        number = np.random.Generator(np.random.Philox(key=self._seed, counter=len(self._said))).random()
        total = np.cumsum(weights)
        place = int(np.searchsorted(total, number * total[-1], side="right"))
        return int(order[min(place, len(order) - 1)])


def candidates(scores: Floats, p: SamplingParams) -> tuple[npt.NDArray[np.int64], Floats]:
    """Ids that may be drawn and their weights, after top-k, top-p and min-p; likeliest first where any cuts.

    Only as much is sorted as the cuts need: sorting 103,424 scores takes longer than all the rest.
    """
    weights = np.exp(scores - scores.max())
    if not p.top_k and p.top_p >= 1.0:
        order = np.flatnonzero(weights >= p.min_p) if p.min_p else np.arange(len(weights))
        return order, weights[order]
    count = min(p.top_k or _FIRST_SORTED, len(weights))
    order = _largest(weights, count)
    total = weights[order].sum() if p.top_k else weights.sum()
    if p.top_p < 1.0:
        while not p.top_k and count < len(weights) and weights[order].sum() < p.top_p * total:
            count = min(8 * count, len(weights))
            order = _largest(weights, count)
        kept = weights[order]
        is_inside = np.cumsum(kept) - kept < p.top_p * total
        is_inside[0] = True
        order = order[is_inside]
    order = order[weights[order] >= p.min_p]  # the largest weight is 1
    return order, weights[order]


_FIRST_SORTED = 256  # candidates sorted at first for top-p; eight times as many where they are too few


def _largest(weights: Floats, count: int) -> npt.NDArray[np.int64]:
    """The ids of the `count` largest, largest first; of equal ones the lower id first."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    bound = np.partition(weights, -count)[-count]
    some = np.flatnonzero(weights >= bound)
    return some[np.argsort(-weights[some], kind="stable")][:count]


def token_logprob(logits: npt.NDArray[np.float32], token: int, num_top: int) -> TokenLogprob:
    """Of the model's own distribution, before any penalty or temperature."""
    scores = logits.astype(np.float64)
    scores = scores - scores.max()
    logs = scores - np.log(np.exp(scores).sum())
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        order = np.argsort(-logs, kind="stable")[:num_top]
        top = tuple((int(i), float(logs[i])) for i in order)
    return TokenLogprob(token, float(logs[token]), top)
