"""`python -m duomo.train.experiments.grpo`: does the reward rise, and only when it is the right one?

The task: the larger of two digits. A short supervised run leaves the model right about half of the time;
GRPO goes on from there over three seeds, and beside each a control with every reward given to another
answer, which must not rise. Judged on the reward before any step and over the last tenth of the steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from duomo.train.experiments.small import series, small_checkpoint, write_result, write_rows
from duomo.train.loop import finetune


def questions() -> list[dict[str, Any]]:
    return [{"query": f"{a} {b}", "response": str(max(a, b))} for a in range(10) for b in range(10) if a != b]


def prepare(folder: Path, seed: int, steps: int) -> Path:
    """A checkpoint that answers with digits and is right about half of the time."""
    base = small_checkpoint(folder / "base", seed)
    rows = write_rows(folder / "rows.jsonl", questions())
    fields = {
        "stage": "sft", "model": str(base), "data": [str(rows)], "output": str(folder / "sft"), "seed": seed,
        "steps": steps, "rate": 2e-3, "warmup_steps": 10, "max_tokens": 1024, "weight_decay": 0.0,
        "save_dtype": "float32", "tensorboard": False, "losses": {"bias_update": 1e-3},
    }  # fmt: skip
    return finetune(fields, say=lambda line: None).folder


def reinforce(folder: Path, start: Path, seed: int, steps: int, shuffled: bool) -> list[float]:
    """The mean reward of every step."""
    output = folder / ("control" if shuffled else "grpo")
    fields = {
        "stage": "grpo", "model": str(start), "data": [str(folder / "rows.jsonl")], "output": str(output),
        "seed": seed, "steps": steps, "packs_per_step": 16, "packing": "none", "rate": 3e-4,
        "schedule": "constant", "weight_decay": 0.0, "warmup_steps": 5, "save_every": 100000,
        "report_every": 1, "tensorboard": False, "max_tokens": 2048, "save_dtype": "float32",
        "grpo": {"group_size": 8, "max_new_tokens": 4, "shuffled": shuffled},
    }  # fmt: skip
    finetune(fields, say=lambda line: None)
    return series(output, "true_reward")


def run(folder: Path, json_file: Path | None, seeds: int, steps: int, sft_steps: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    tenth = max(1, steps // 10)
    for seed in range(seeds):
        home = folder / f"seed{seed}"
        start = prepare(home, seed, sft_steps)
        entry: dict[str, Any] = {"seed": seed}
        for name, shuffled in (("reward", False), ("control", True)):
            rewards = reinforce(home, start, seed, steps, shuffled)
            entry[name] = {
                "first": round(float(np.mean(rewards[:tenth])), 4),
                "last": round(float(np.mean(rewards[-tenth:])), 4),
            }
        found.append(entry)
        print(entry, flush=True)
    result = {"task": "larger of two digits", "steps": steps, "answers_per_step": 128, "seeds": found}
    write_result(json_file, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments/grpo"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sft-steps", type=int, default=25)
    options = parser.parse_args()
    run(options.folder, options.json, options.seeds, options.steps, options.sft_steps)


if __name__ == "__main__":
    main()
