"""`python -m duomo.tasks.rows NAME OUT`: a family or trade as training rows, OpenAI messages beside PNGs.

For people who train an adapter with the general kit: `train.jsonl` and `unseen.jsonl` come from the training
and the test split, one question a row, so an adapter is judged on scenes, textures, slides and fonts it never
saw. A row's `kind` is what `duomo eval --data` counts it under.
"""

from __future__ import annotations

import argparse
import json
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


if __name__ == "__main__":
    main()
