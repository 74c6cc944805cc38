"""`python -m duomo.tasks.rows NAME OUT`: a family or trade as training rows, OpenAI messages beside PNGs.

For people who train an adapter with the general kit: `train.jsonl` and `unseen.jsonl` come from the training
and the test split, one question a row, so an adapter is judged on scenes, textures, slides and fonts it never
saw. A row's `kind` is what `duomo eval --data` counts it under.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duomo.tasks.families import FAMILIES, TRADES
from duomo.tasks.pools import Pools, load_pools
from duomo.tasks.scene import Turn


def write_rows(source: str, pools: Pools, folder: Path, name: str, num: int, seed: int = 0) -> Path:
    """`num` rows in `folder/name.jsonl`, their pictures in `folder/name/`. Not for videos or tool calls."""
    generate = {**FAMILIES, **TRADES}[source]
    rng = np.random.default_rng([seed, num])
    pictures = folder / name
    pictures.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    while len(lines) < num:
        example = generate(rng, pools)
        place = None
        if example.picture is not None:
            place = f"{name}/{len(lines)}.png"
            Image.fromarray(example.picture).save(folder / place)
        lines += [json.dumps(row_of(turn, place), ensure_ascii=False) for turn in example.turns]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines[:num]) + "\n", encoding="utf-8")
    return path


def row_of(turn: Turn, place: str | None) -> dict[str, Any]:
    """One question; its picture stands before it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": turn.question}]
    if place is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": place}})
    answer = {"role": "assistant", "content": turn.answer}
    if turn.reasoning is not None:
        answer["reasoning_content"] = turn.reasoning
    return {"kind": turn.kind, "messages": [{"role": "user", "content": content}, answer]}


def commonest(path: Path) -> dict[str, float]:
    """By kind, the share of rows that a blind guess gets right: the commonest answer in the row's language.

    With thinking an answer is its thought too, as `duomo eval` has it.
    """
    counts: defaultdict[str, defaultdict[bool, Counter[tuple[str, str]]]]
    counts = defaultdict(lambda: defaultdict(Counter))
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked, answer = row["messages"]
        is_english = asked["content"][-1]["text"].isascii()
        counts[row["kind"]][is_english][answer.get("reasoning_content", ""), answer["content"]] += 1
    return {
        kind: sum(max(found.values()) for found in by.values()) / sum(found.total() for found in by.values())
        for kind, by in sorted(counts.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name in (*FAMILIES, *TRADES) if name not in ("clips", "instructions")]
    parser.add_argument("name", choices=names)
    parser.add_argument("out", type=Path, help="folder for train.jsonl, unseen.jsonl and their pictures")
    parser.add_argument("--num", type=int, default=6000, help="rows to train on")
    parser.add_argument("--unseen", type=int, default=400, help="rows to judge by")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    given = parser.parse_args()
    for split, part, num in (("train", "train", given.num), ("test", "unseen", given.unseen)):
        path = write_rows(given.name, load_pools(given.cache, split), given.out, part, num)
        print(path)
    for kind, share in commonest(path).items():
        print(f"  {kind}: {100 * share:.1f} % by the commonest answer")


if __name__ == "__main__":
    main()
