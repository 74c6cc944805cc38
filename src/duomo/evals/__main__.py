"""`python -m duomo.evals`: the embedded model on its frozen held-out questions, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.checksums import sha256_of
from duomo.evals.contrast import contrasts
from duomo.evals.embedded import (
    Score,
    answer_all,
    answer_blind,
    score_by_kind,
    score_digits,
    score_json,
    score_reading_by_length,
)
from duomo.evals.families import family_questions, rendered_questions
from duomo.evals.questions import NUM_OTHER, NUM_READ, frozen_questions, hash_of
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import load_handwriting
from duomo.tasks.pools import load_pools

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"


NUM_FAMILY = 100


def evaluate(
    model_folder: Path,
    cache: Path,
    num_read: int = NUM_READ,
    num_other: int = NUM_OTHER,
    num_family: int = NUM_FAMILY,
) -> dict[str, Any]:
    """Scores of a checkpoint, ready for JSON. `num_family` 0 leaves the wider families out."""
    started = time.process_time()
    model = load_model(model_folder, torch.float32).eval()
    tokenizer = Tokenizer.load(model_folder)
    questions = frozen_questions(load_handwriting(cache, "test"), num_read, num_other)
    if num_family:
        pools = load_pools(cache, "test")
        questions += family_questions(pools, num_family) + rendered_questions(pools, num_family)
    answers = answer_all(model, tokenizer, questions)
    blind = answer_blind(model, tokenizer, questions, answers)
    scores: dict[str, Score] = {"digits/each digit": score_digits(questions, answers, blind)}
    scores |= score_reading_by_length(questions, answers, blind)
    scores |= score_by_kind(questions, answers, blind)
    valid = score_json(questions, answers)
    if valid is not None:
        scores["text/json and calls that parse"] = valid
    weights = sorted(model_folder.glob("*.safetensors"))
    return {
        "questions": {"num": len(questions), "hash": hash_of(questions)},
        "weights_sha256": {file.name: sha256_of(file) for file in weights},
        "scores": {name: score.to_json() for name, score in scores.items()},
        "thinking": {kind: contrast.to_json() for kind, contrast in contrasts(scores).items()},
        "cpu_seconds": round(time.process_time() - started),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def table(result: dict[str, Any]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| question | n | exact | 95 % interval | grey picture | commonest answer |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, score in result["scores"].items():
        share = {key: f"{100 * value:.1f}" for key, value in score.items() if key != "num"}
        lines.append(
            f"| {name} | {score['num']} | {share['accuracy']} % | {share['low']}-{share['high']} "
            f"| {share['blind']} % | {share['majority']} % |"
        )
    lines += [
        "",
        "| thinking against not | direct | thinking | gain | 95 % interval |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, gained in result["thinking"].items():
        shares = [f"{100 * right / num:.1f} %" for right, num in (gained["direct"], gained["thinking"])]
        gain, low, high = (f"{100 * gained[key]:+.1f}" for key in ("gain", "low", "high"))
        lines.append(f"| {name} | {shares[0]} | {shares[1]} | {gain} | {low} to {high} |")
    return "\n".join(lines)


def run(
    model: Path | None = None,
    cache: Path = Path("runs/cache"),
    json_path: Path | None = None,
    num_read: int | None = None,
    num_other: int | None = None,
    num_family: int | None = None,
) -> None:
    """Evaluates and prints the table; None takes the embedded model and the frozen counts."""
    given = zip((num_read, num_other, num_family), (NUM_READ, NUM_OTHER, NUM_FAMILY), strict=True)
    counts = [usual if asked is None else asked for asked, usual in given]
    result = evaluate(model or EMBEDDED, cache, *counts)
    print(table(result))
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; the embedded model if none")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--read", type=int, help="pictures to read")
    parser.add_argument("--other", type=int, help="questions of every other kind")
    parser.add_argument("--family", type=int, help="questions of every kind of the wider families")
    options = parser.parse_args()
    run(options.model, options.cache, options.json, options.read, options.other, options.family)


if __name__ == "__main__":
    main()
