"""Two checkpoints on the same held-out questions: `python -m duomo.evals.paired FIRST SECOND`.

Both answer every question greedily; a question counts where exactly one of them is right. The difference of
two shares measured so has a far smaller error than either share, which is what "within one point" needs.
Questions come in blocks drawn from all kinds alike, so what is known after any block is an honest sample,
and a run taken up again reads the answers it has (`evals.kept`). Intervals are 95 %, by
Bonett and Price (2012): the normal law with one question more of each disagreement, so that no difference in
a few questions is no certainty.
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

import numpy as np
import torch

from duomo.checkpoints import load_model
from duomo.evals.embedded import answer_all
from duomo.evals.families import family_questions
from duomo.evals.kept import KeptAnswers
from duomo.evals.questions import Question, frozen_questions, hash_of
from duomo.evals.verdicts import is_right
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import load_handwriting
from duomo.tasks.pools import load_pools

Row = dict[str, float]
BLOCK = 480  # questions after which the answers so far are written and judged
BOUND = 1.0  # points that a family may lose


def difference(first: Sequence[bool], second: Sequence[bool]) -> Row:
    """Shares right, and second minus first in points with its interval."""
    num = len(first)
    steps = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    lost, gained = ((1 + sum(step == sign for step in steps)) / (num + 2) for sign in (-1, 1))
    mean, middle = sum(steps) / num, gained - lost
    half = 1.96 * math.sqrt((gained + lost - middle**2) / (num + 2))
    return {
        "num": num,
        "first": round(100 * sum(first) / num, 2),
        "second": round(100 * sum(second) / num, 2),
        "lost": sum(step < 0 for step in steps),
        "gained": sum(step > 0 for step in steps),
        "points": round(100 * mean, 2),
        "low": round(100 * max(middle - half, -1.0), 2),
        "high": round(100 * min(middle + half, 1.0), 2),
    }


def compare(questions: Sequence[Question], first: Sequence[str], second: Sequence[str]) -> Mapping[str, Row]:
    """`difference` of each kind of question, and of each family: the part of a kind before the slash."""
    right: dict[str, tuple[list[bool], list[bool]]] = defaultdict(lambda: ([], []))
    for question, *answers in zip(questions, first, second, strict=True):
        for group in (question.kind.partition("/")[0], question.kind):
            for found, answer in zip(right[group], answers, strict=True):
                found.append(is_right(question.kind, question.answer, answer))
    return {group: difference(*pair) for group, pair in sorted(right.items())}


def verdict(row: Row) -> str:
    """What the interval says about losing at most a point."""
    if row["low"] >= -BOUND:
        return "within"
    return "lost more" if row["high"] < -BOUND else "open"


def table(rows: Mapping[str, Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| question | n | first | second | lost, gained | difference, points | 95 % interval | one point |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for group, row in rows.items():
        lines.append(
            f"| {group} | {row['num']} | {row['first']:.1f} % | {row['second']:.1f} % "
            f"| {row['lost']}, {row['gained']} | {row['points']:+.2f} "
            f"| {row['low']:+.2f} to {row['high']:+.2f} | {verdict(row)} |"
        )
    return "\n".join(lines)


class Sitter:
    """A checkpoint as users run it: packed weights on the native kernels where it is quantized."""

    def __init__(self, folder: Path, kept: KeptAnswers) -> None:
        self.model = load_model(folder, torch.float32).eval()
        self.tokenizer, self.kept = Tokenizer.load(folder), kept

    def answer(self, numbers: Sequence[int], questions: Sequence[Question]) -> int:
        """Answers the questions of those numbers that it has not answered yet; returns how many they were."""
        asked = [number for number in numbers if number not in self.kept]
        answers = answer_all(self.model, self.tokenizer, [questions[number] for number in asked])
        self.kept.add(dict(zip(asked, answers, strict=True)))
        return len(asked)


def shuffled(num: int) -> list[int]:
    """All numbers below `num` in an order of no kind's, the same at every call."""
    return [int(number) for number in np.random.default_rng(num).permutation(num)]


def progress(done: int, total: int, seconds_left: float, rows: Mapping[str, Row]) -> str:
    """One line: how far, and the families so far."""
    families = ", ".join(
        f"{group} {row['points']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        for group, row in rows.items()
        if "/" not in group
    )
    return f"{done} of {total}, {seconds_left / 60:.0f} minutes left: {families}"


def ask_both(
    questions: Sequence[Question], folders: tuple[Path, Path], kept: Path, path: Path | None = None
) -> Mapping[str, Row]:
    """Asks both folders every question, those in `kept` not again; prints as it goes; writes `path`."""
    digest, order = hash_of(list(questions)), shuffled(len(questions))
    sitters = [Sitter(folder, KeptAnswers.of(kept, folder, digest)) for folder in folders]
    rows: Mapping[str, Row] = {}
    seconds, fresh = 0.0, 0
    for start in range(0, len(order), BLOCK):
        block, began = order[start : start + BLOCK], time.monotonic()
        num_asked = sum(sitter.answer(block, questions) for sitter in sitters)
        if num_asked:
            seconds, fresh = seconds + time.monotonic() - began, fresh + num_asked
        done = order[: start + BLOCK]
        rows = compare([questions[n] for n in done], *([sitter.kept[n] for n in done] for sitter in sitters))
        to_ask = sum(number not in sitter.kept for sitter in sitters for number in order[start + BLOCK :])
        left = seconds / max(fresh, 1) * to_ask
        print(progress(len(done), len(order), left, rows), flush=True)
        if path:
            result: dict[str, Any] = {
                "first": folders[0].name,
                "second": folders[1].name,
                "questions": {"num": len(questions), "answered": len(done), "hash": digest},
                "rows": rows,
                "date": time.strftime("%Y-%m-%d"),
            }
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return rows


def all_questions(cache: Path, num_read: int, num_other: int, num_family: int) -> list[Question]:
    """Frozen questions of the first three families, and of the wider ones where any are asked for."""
    questions = frozen_questions(load_handwriting(cache, "test"), num_read, num_other)
    return questions + (family_questions(load_pools(cache, "test"), num_family) if num_family else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--read", type=int, default=4000, help="pictures to read")
    parser.add_argument("--other", type=int, default=2000, help="questions of every other kind")
    parser.add_argument("--family", type=int, default=0, help="questions of every kind of the wider families")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--kept", type=Path, default=Path("runs/paired"), help="where answers are kept")
    parser.add_argument("--json", type=Path, help="also write the rows here, after every block")
    given = parser.parse_args()
    questions = all_questions(given.cache, given.read, given.other, given.family)
    rows = ask_both(questions, (given.first, given.second), given.kept, given.json)
    print(table(rows))
    families = {group: verdict(row) for group, row in rows.items() if "/" not in group}
    for said in ("within", "open", "lost more"):
        print(f"{said}: {', '.join(group for group, own in families.items() if own == said) or 'none'}")


if __name__ == "__main__":
    main()
