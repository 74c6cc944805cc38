"""`python -m duomo.train.experiments.adapters`: what an adapter learns, and what it wins back over 2 bits.

On the embedded model, whose files stay as they are. A task it never saw (which of two numbers is larger,
chance 50 %) is learned by an adapter over the bf16 base and by one over the same base at 2 bits; the old
talk and sums are judged before and after. Then an adapter over 2 bits trained on the old tasks: how much of
the loss that 2 bits cost does it win back? Every judgement is on questions of no training row.
"""

from __future__ import annotations

import argparse
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from duomo.quant import quantize
from duomo.tasks import dialogue
from duomo.tasks.scene import Split, split_of
from duomo.train.evaluate import Evaluation, evaluate_folder
from duomo.train.experiments.small import write_result, write_rows
from duomo.train.finish import copy_companions
from duomo.train.loop import finetune
from duomo.train.stages import EMBEDDED

Fields = dict[str, Any]


def larger_rows(split: Split, count: int, seed: int) -> list[Fields]:
    """Pairs of numbers below 100, each pair in one split."""
    rng = np.random.default_rng(seed)
    rows: list[Fields] = []
    while len(rows) < count:
        a, b = (int(v) for v in rng.integers(0, 100, size=2))
        if a == b or split_of(f"larger {min(a, b)} {max(a, b)}") != split:
            continue
        answer = "first" if a > b else "second"
        rows.append({"query": f"Which is larger, the first or the second: {a} or {b}?", "response": answer})
    return rows


def old_rows(split: Split, count: int, seed: int) -> list[Fields]:
    """Talk and sums, as the embedded model knows them."""
    rng = np.random.default_rng(seed)
    rows: list[Fields] = []
    while len(rows) < count:
        (turn,) = dialogue.generate(rng, split).turns
        thought = f"<think>\n{turn.reasoning}\n</think>\n" if turn.reasoning else ""
        rows.append({"src": [turn.question], "tgt": [thought + turn.answer]})
    return rows


def adapt(base: Path, rows: Path, output: Path, steps: int, rate: float) -> Path:
    fields = {
        "stage": "sft", "model": str(base), "data": [str(rows)], "output": str(output), "steps": steps,
        "max_tokens": 768, "rate": rate, "warmup_steps": 10, "weight_decay": 0.0, "tensorboard": False,
        "save_every": 20, "lora": {"ranks": {"attention": 16, "shared": 16, "dense": 16, "text_experts": 4}},
    }  # fmt: skip
    return finetune(fields, say=lambda line: print(f"{output.name}: {line}", flush=True)).folder


def figures(found: Evaluation) -> Fields:
    share = round(found.answers_right, 4)
    return {"loss": round(found.loss, 4), "answers_right": share, "rows": found.num_samples}


def digest(folder: Path) -> str:
    return sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()


def run(folder: Path, json_file: Path | None, steps: int, num_test: int) -> Fields:
    packed = folder / "two_bits"
    if not (packed / "config.json").is_file():
        quantize(EMBEDDED, packed)
        copy_companions(EMBEDDED, packed)
    before = {name: digest(place) for name, place in (("bf16", EMBEDDED), ("2 bits", packed))}
    new = write_rows(folder / "new.jsonl", larger_rows("train", 1500, 1))
    new_test = write_rows(folder / "new_test.jsonl", larger_rows("test", num_test, 2))
    old = write_rows(folder / "old.jsonl", old_rows("train", 1500, 3))
    old_test = write_rows(folder / "old_test.jsonl", old_rows("test", num_test, 4))

    def judge(base: Path, rows: Path, adapter: Path | None = None) -> Fields:
        return figures(evaluate_folder(base, [rows], adapter))

    bases = {"bf16": EMBEDDED, "2 bits": packed}
    learned = {name: adapt(base, new, folder / f"new {name}", steps, 3e-3) for name, base in bases.items()}
    restored = {name: adapt(base, old, folder / f"old {name}", steps, 3e-4) for name, base in bases.items()}
    result: Fields = {"steps": steps, "new task": {}, "old tasks": {}}
    for name, base in bases.items():
        result["new task"][name] = {
            "before": judge(base, new_test),
            "after": judge(base, new_test, learned[name]),
        }
        result["old tasks"][name] = {
            "before": judge(base, old_test),
            "after the new task": judge(base, old_test, learned[name]),
            "after an adapter of their own": judge(base, old_test, restored[name]),
        }
    result["new task"]["adapter of 2 bits on bf16"] = judge(EMBEDDED, new_test, learned["2 bits"])
    plain, bits = (result["old tasks"][name]["before"]["loss"] for name in bases)
    won = result["old tasks"]["2 bits"]["after an adapter of their own"]["loss"]
    result["share of the gap won back"] = round((bits - won) / (bits - plain), 3)
    result["bases unchanged"] = before == {name: digest(place) for name, place in bases.items()}
    write_result(json_file, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments/adapters"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--test", type=int, default=300)
    options = parser.parse_args()
    run(options.folder, options.json, options.steps, options.test)


if __name__ == "__main__":
    main()
