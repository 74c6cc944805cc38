"""How well the embedded model answers: accuracy by kind of question on the frozen held-out set.

Every answer is generated greedily and must match, exactly but for the kinds that `verdicts` names. Beside
each score stand two that need no eyes: the same model before a grey picture, and the commonest answer of the
set. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from duomo.evals.decoding import generate_greedy
from duomo.evals.questions import Question, prompt_of
from duomo.evals.verdicts import DATA, is_right, parsed
from duomo.model import Ernie
from duomo.processing.tokenizer import Tokenizer

BATCH = 48
MAX_TOKENS = 160


@dataclass(frozen=True, slots=True)
class Score:
    """`right` of `num` questions; `blind` before a grey picture, `majority` by the commonest answer."""

    num: int
    right: int
    blind: int
    majority: int

    def to_json(self) -> dict[str, Any]:
        low, high = wilson(self.right, self.num)
        return {
            "num": self.num,
            "accuracy": round(self.right / self.num, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "blind": round(self.blind / self.num, 4),
            "majority": round(self.majority / self.num, 4),
        }


def wilson(right: int, num: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, in 0..1."""
    if num == 0:
        return 0.0, 1.0
    share = right / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, centre - half), min(1.0, centre + half)


def answer_blind(
    model: Ernie, tokenizer: Tokenizer, questions: Sequence[Question], answers: Sequence[str]
) -> list[str]:
    """The answers before a grey picture; a question without a picture keeps the answer it got."""
    seeing = [i for i, question in enumerate(questions) if question.picture is not None]
    found = list(answers)
    blind = answer_all(model, tokenizer, [questions[i].blinded() for i in seeing])
    for index, answer in zip(seeing, blind, strict=True):
        found[index] = answer
    return found


def answer_all(
    model: Ernie,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """The model's final answers, in order; reasoning before `</think>` is cut off."""
    answers = [""] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: _cost(questions[i]))
    unthink = tokenizer.special_id("</think>")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        prompts = [prompt_of(questions[row], tokenizer) for row in rows]
        outputs = generate_greedy(model, prompts, tokenizer.eos_ids, MAX_TOKENS)
        for row, output in zip(rows, outputs, strict=True):
            answers[row] = _final(output, unthink, tokenizer)
        say(f"{min(start + BATCH, len(order))}/{len(order)} questions")
    return answers


def _cost(question: Question) -> tuple[bool, tuple[int, ...]]:
    """Equal pictures and equal lengths of answer side by side."""
    return question.thinking, question.picture.shape if question.picture is not None else ()


def _final(output: list[int], unthink: int, tokenizer: Tokenizer) -> str:
    if unthink in output:
        output = output[output.index(unthink) + 1 :]
    return tokenizer.decode(output).strip()


def majority_answers(questions: Sequence[Question]) -> list[str]:
    """The commonest answer of each kind and language in the set itself: a bound no constant can beat."""
    counts: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    for question in questions:
        counts[_group(question)][question.answer] += 1
    return [counts[_group(question)].most_common(1)[0][0] for question in questions]


def _group(question: Question) -> tuple[str, bool]:
    return question.kind, question.question.isascii()


def score_by_kind(
    questions: Sequence[Question], answers: Sequence[str], blind: Sequence[str]
) -> dict[str, Score]:
    """Exact matches by kind."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for question, *given in zip(questions, answers, blind, majority_answers(questions), strict=True):
        row = totals[question.kind]
        row[0] += 1
        for column, answer in enumerate(given, start=1):
            row[column] += is_right(question.kind, question.answer, answer)
    return {kind: Score(*row) for kind, row in sorted(totals.items())}


def score_json(questions: Sequence[Question], answers: Sequence[str]) -> Score | None:
    """How many of the answers that must be JSON parse at all, right or wrong; None if none must."""
    given = [a for q, a in zip(questions, answers, strict=True) if q.kind in DATA]
    valid = sum(parsed(answer) is not None for answer in given)
    return Score(len(given), valid, valid, 0) if given else None


def score_digits(questions: Sequence[Question], answers: Sequence[str], blind: Sequence[str]) -> Score:
    """Single digits of the reading questions, place by place from the left."""
    row = [0, 0, 0, 0]
    for question, *given in zip(questions, answers, blind, majority_answers(questions), strict=True):
        if question.kind != "digits/read":
            continue
        row[0] += len(question.answer)
        for column, answer in enumerate(given, start=1):
            row[column] += sum(a == b for a, b in zip(question.answer, answer, strict=False))
    return Score(*row)


def score_reading_by_length(
    questions: Sequence[Question], answers: Sequence[str], blind: Sequence[str]
) -> dict[str, Score]:
    """Whole strings of one, two and three digits apart."""
    found = {}
    for length in (1, 2, 3):
        rows = [i for i, q in enumerate(questions) if q.kind == "digits/read" and len(q.answer) == length]
        chosen = [questions[i] for i in rows], [answers[i] for i in rows], [blind[i] for i in rows]
        if rows:
            found[f"digits/read of {length}"] = score_by_kind(*chosen)["digits/read"]
    return found
