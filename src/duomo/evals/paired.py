"""Two checkpoints on the same held-out questions: `python -m duomo.evals.paired FIRST SECOND`.

Both answer every question greedily; a question counts where exactly one of them is right. The difference of
two shares measured so has a far smaller error than either share, which is what "within one point" needs.
Intervals are 95 %, by the normal law of the mean of n differences in {-1, 0, 1}.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from duomo.checkpoints import load_model
from duomo.evals.embedded import answer_all
from duomo.evals.questions import Question, frozen_questions, hash_of
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import load_handwriting

Row = dict[str, float]


def difference(first: Sequence[bool], second: Sequence[bool]) -> Row:
    """Shares right, and second minus first in points with its interval."""
    num = len(first)
    steps = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    mean = sum(steps) / num
    variance = sum((step - mean) ** 2 for step in steps) / max(num - 1, 1)
    half = 1.96 * math.sqrt(variance / num)
    return {
        "num": num,
        "first": round(100 * sum(first) / num, 2),
        "second": round(100 * sum(second) / num, 2),
        "lost": sum(step < 0 for step in steps),
        "gained": sum(step > 0 for step in steps),
        "points": round(100 * mean, 2),
        "low": round(100 * (mean - half), 2),
        "high": round(100 * (mean + half), 2),
    }


def compare(questions: Sequence[Question], first: Sequence[str], second: Sequence[str]) -> Mapping[str, Row]:
    """`difference` of each kind of question, and of each family: the part of a kind before the slash."""
    right: dict[str, tuple[list[bool], list[bool]]] = defaultdict(lambda: ([], []))
    for question, *answers in zip(questions, first, second, strict=True):
        for group in (question.kind.partition("/")[0], question.kind):
            for found, answer in zip(right[group], answers, strict=True):
                found.append(answer == question.answer)
    return {group: difference(*pair) for group, pair in sorted(right.items())}


def table(rows: Mapping[str, Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| question | n | first | second | lost, gained | difference, points | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for group, row in rows.items():
        lines.append(
            f"| {group} | {row['num']} | {row['first']:.1f} % | {row['second']:.1f} % "
            f"| {row['lost']}, {row['gained']} | {row['points']:+.2f} "
            f"| {row['low']:+.2f} to {row['high']:+.2f} |"
        )
    return "\n".join(lines)


def answers_of(folder: Path, questions: Sequence[Question]) -> list[str]:
    """By the checkpoint as users run it: packed weights on the native kernels where it is quantized."""
    return answer_all(load_model(folder, torch.float32).eval(), Tokenizer.load(folder), questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--read", type=int, default=4000, help="pictures to read")
    parser.add_argument("--other", type=int, default=2000, help="questions of every other kind")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    questions = frozen_questions(load_handwriting(given.cache, "test"), given.read, given.other)
    rows = compare(questions, *(answers_of(folder, questions) for folder in (given.first, given.second)))
    print(table(rows))
    if given.json:
        result: dict[str, Any] = {
            "first": str(given.first),
            "second": str(given.second),
            "questions": {"num": len(questions), "hash": hash_of(questions)},
            "rows": rows,
            "date": time.strftime("%Y-%m-%d"),
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
