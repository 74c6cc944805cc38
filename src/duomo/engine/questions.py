"""Questions answered from logits: the options' log-probabilities after one prompt, as shares.

An option of several tokens is scored whole, as the sum over its tokens; nothing is decoded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from duomo.processing.messages import Part


@dataclass(frozen=True, slots=True)
class Question:
    """A question whose answer is one of a few words. With numbers as options, the mean is the score."""

    text: str
    options: tuple[str, ...] = ("Yes", "No")
    lead: tuple[Part, ...] = ()  # what comes before the text: a picture to compare with, say


@dataclass(frozen=True, slots=True)
class Decision:
    """The likeliest option, the probabilities of all (they sum to one), and the mean of numeric options."""

    answer: str
    probabilities: dict[str, float]
    score: float | None = None


def decide(question: Question, logprobs: list[float]) -> Decision:
    best = max(logprobs)
    weights = [math.exp(value - best) for value in logprobs]
    shares = {option: w / sum(weights) for option, w in zip(question.options, weights, strict=True)}
    answer = max(shares, key=lambda option: shares[option])
    try:
        score = sum(float(option) * share for option, share in shares.items())
    except ValueError:
        return Decision(answer, shares)
    return Decision(answer, shares, score)
