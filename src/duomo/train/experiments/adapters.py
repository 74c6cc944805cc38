"""`python -m duomo.train.experiments.adapters`: what an adapter learns, and what it wins back over 2 bits.

On the embedded model, whose files stay as they are. A task it never saw (odd or even, numbers of no training
row, chance 50 %) is learned by an adapter over the bf16 base and by one over 2 bits. "All 2 bits" puts every
matrix of the decoder at 2 bits by plain rounding, which costs more than the plan that ships: there an adapter
trained on talk and sums is judged by how much of the cost it wins back, on sums of no training row.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from duomo.checkpoints.load import load_config
from duomo.quant import build_plan, quantize
from duomo.quant.plan import Kind
from duomo.tasks import dialogue
from duomo.tasks.scene import Split, split_of
from duomo.train.evaluate import Evaluation, evaluate_folder
from duomo.train.experiments.small import write_result, write_rows
from duomo.train.finish import copy_companions
from duomo.train.loop import finetune
from duomo.train.stages import EMBEDDED

Fields = dict[str, Any]


def parity_rows(split: Split, count: int, seed: int) -> list[Fields]:
    """Numbers below 1,000, each in one split."""
    rng = np.random.default_rng(seed)
    rows: list[Fields] = []
    while len(rows) < count:
        number = int(rng.integers(0, 1000))
        if split_of(f"parity {number}") == split:
            answer = "odd" if number % 2 else "even"
            rows.append({"query": f"Odd or even: {number}?", "response": answer})
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


def packed_base(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        quantize(
            EMBEDDED,
            folder,
            replace(build_plan("2", load_config(EMBEDDED)), name="2", attention=Kind.TWO, dense=Kind.TWO),
        )
        copy_companions(EMBEDDED, folder)
    return folder


def run(folder: Path, json_file: Path | None, steps: int, num_test: int) -> Fields:
    bases = {"bf16": EMBEDDED, "all 2 bits": packed_base(folder / "two_bits")}
    before = {name: digest(place) for name, place in bases.items()}
    new = write_rows(folder / "new.jsonl", parity_rows("train", 1500, 1))
    new_test = write_rows(folder / "new_test.jsonl", parity_rows("test", num_test, 2))
    old = write_rows(folder / "old.jsonl", old_rows("train", 1500, 3))
    old_test = write_rows(folder / "old_test.jsonl", old_rows("test", num_test, 4))

    def judge(base: Path, rows: Path, adapter: Path | None = None) -> Fields:
        return figures(evaluate_folder(base, [rows], adapter))

    learned = {name: adapt(base, new, folder / f"new {name}", steps, 2e-3) for name, base in bases.items()}
    restored = adapt(bases["all 2 bits"], old, folder / "old all 2 bits", steps, 3e-4)
    result: Fields = {"steps": steps, "new task": {}, "old tasks": {}}
    for name, base in bases.items():
        result["new task"][name] = {
            "before": judge(base, new_test),
            "after": judge(base, new_test, learned[name]),
        }
        result["old tasks"][name] = {
            "before": judge(base, old_test),
            "after the new task": judge(base, old_test, learned[name]),
        }
    result["new task"]["adapter of 2 bits on bf16"] = judge(EMBEDDED, new_test, learned["all 2 bits"])
    own = judge(bases["all 2 bits"], old_test, restored)
    result["old tasks"]["all 2 bits"]["after an adapter of their own"] = own
    plain, bits = (result["old tasks"][name]["before"]["loss"] for name in bases)
    result["share of the loss won back"] = round((bits - own["loss"]) / (bits - plain), 3)
    result["bases unchanged"] = before == {name: digest(place) for name, place in bases.items()}
    write_result(json_file, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments/adapters"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--test", type=int, default=200)
    options = parser.parse_args()
    run(options.folder, options.json, options.steps, options.test)


if __name__ == "__main__":
    main()
