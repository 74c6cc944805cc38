"""`python -m duomo.evals`: the embedded model on its frozen held-out questions, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from duomo.checkpoints import load_model
from duomo.evals.embedded import Score, answer_all, score_by_kind, score_digits, score_reading_by_length
from duomo.evals.questions import NUM_OTHER, NUM_READ, frozen_questions, hash_of
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import load_handwriting

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"


def evaluate(
    model_folder: Path, cache: Path, num_read: int = NUM_READ, num_other: int = NUM_OTHER
) -> dict[str, Any]:
    """Scores of a checkpoint, ready for JSON."""
    started = time.process_time()
    model = load_model(model_folder, torch.float32).eval()
    tokenizer = Tokenizer.load(model_folder)
    questions = frozen_questions(load_handwriting(cache, "test"), num_read, num_other)
    answers = answer_all(model, tokenizer, questions)
    blind = answer_all(model, tokenizer, [question.blinded() for question in questions])
    scores: dict[str, Score] = {"digits/each digit": score_digits(questions, answers, blind)}
    scores |= score_reading_by_length(questions, answers, blind)
    scores |= score_by_kind(questions, answers, blind)
    weights = sorted(model_folder.glob("*.safetensors"))
    return {
        "questions": {"num": len(questions), "hash": hash_of(questions)},
        "weights_sha256": {file.name: sha256(file.read_bytes()).hexdigest() for file in weights},
        "scores": {name: score.to_json() for name, score in scores.items()},
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
    return "\n".join(lines)


def run(
    model: Path | None = None,
    cache: Path = Path("runs/cache"),
    json_path: Path | None = None,
    num_read: int | None = None,
    num_other: int | None = None,
) -> None:
    """Evaluates and prints the table; None takes the embedded model and the frozen counts."""
    counts = (NUM_READ if num_read is None else num_read, NUM_OTHER if num_other is None else num_other)
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
    options = parser.parse_args()
    run(options.model, options.cache, options.json, options.read, options.other)


if __name__ == "__main__":
    main()
