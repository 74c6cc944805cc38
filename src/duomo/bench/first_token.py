"""`python -m duomo.bench.first_token CHECKPOINT`: from the command `duomo ask` to its first character.

Process start, imports and opening included. Warm: the system has the files cached. Cold: it forgot them
before (`--cold` needs the right to write /proc/sys/vm/drop_caches). With `--picture`, the same question
twice about one picture in one process: the second must do no vision work, and is compared with a question
of text as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from duomo.bench.memory import GREEDY, noise_picture, random_ids
from duomo.llm import LLM
from duomo.processing.messages import Message


def ask_s(checkpoint: Path) -> float:
    command = [sys.executable, "-m", "duomo", "ask", "What is seven times six?", "--model", str(checkpoint)]
    begun = time.perf_counter()
    with subprocess.Popen([*command, "--max-tokens", "4", "--no-thinking"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        os.read(child.stdout.fileno(), 1)
        found = time.perf_counter() - begun
        child.stdout.read()
    if child.returncode:
        raise SystemExit(f"duomo ask ended with {child.returncode}")
    return found


def forget_files() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def first_s(llm: LLM, prompt: list[Message] | list[int]) -> tuple[float, int]:
    """(seconds to the first token, tokens of the prompt)."""
    begun, first, size = time.perf_counter(), 0.0, 0
    asked = list(prompt)
    deltas = (
        llm.stream(asked, GREEDY) if isinstance(asked[0], Message) else llm.stream_generate(asked, GREEDY)  # type: ignore[arg-type]
    )
    for delta in deltas:
        first = first or time.perf_counter() - begun
        size = delta.usage.prompt_tokens if delta.usage else size
    return first, size


def second_question(checkpoint: Path, side_px: int, repeats: int) -> dict[str, Any]:
    """Times of the first and of later questions about one picture, and of text as long as what is new."""
    picture = noise_picture(side_px)
    rows: dict[str, Any] = {"picture_px": side_px}
    with LLM.open(checkpoint, max_model_tokens=4096, max_sequences=1) as llm:
        text_s(llm, 16, seed=0)
        rows["first_s"], rows["prompt_tokens"] = first_s(llm, [Message.of("user", picture, "What is this?")])
        encoded = llm.stats()["media_encoded"]
        later, text = [], []
        for index in range(repeats):
            cached = llm.stats()["cached_tokens"]
            question = f"And number {index}, what is it?"
            seconds, size = first_s(llm, [Message.of("user", picture, question)])
            later.append(seconds)
            text.append(text_s(llm, size - int(llm.stats()["cached_tokens"] - cached), seed=index + 1))
        rows["media_encoded_again"] = llm.stats()["media_encoded"] - encoded
        rows |= {"second_s": later, "text_s": text, "ratio": round(median(later) / median(text), 3)}
    return rows


def text_s(llm: LLM, count: int, seed: int) -> float:
    return first_s(llm, random_ids(llm, count, seed))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--picture", type=int, metavar="PX", help="side of a picture to ask twice about")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"checkpoint": options.checkpoint.name}
    if options.picture:
        found |= second_question(options.checkpoint, options.picture, options.repeats)
    else:
        ask_s(options.checkpoint)
        found["warm_s"] = [round(ask_s(options.checkpoint), 3) for _ in range(options.repeats)]
        if options.cold:
            forget_files()
            found["cold_s"] = round(ask_s(options.checkpoint), 3)
    print(json.dumps(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
