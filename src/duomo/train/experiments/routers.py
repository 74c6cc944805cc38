"""`python -m duomo.train.experiments.routers`: the router's terms, each against a run without it.

A small model learns small sums; everything but the term is the same. Orthogonality (in the loss, and
decoupled) is judged by the mean cosine between experts' router rows, balance and the bias without a loss by
the most used expert over the mean, from routers that begin collapsed: all tokens on few experts. That takes
three times the steps: a bias moves by its rate at each step and no less, so at 0.005 a bias of 0.5 is undone
after 100 steps; at larger rates it swings about the balance.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from duomo.checkpoints import load_model, save_model
from duomo.train.experiments.small import series, small_checkpoint, write_result, write_rows
from duomo.train.loop import finetune
from duomo.train.routing import router_places

Fields = dict[str, Any]
VARIANTS: dict[str, Fields] = {
    "none": {},
    "orthogonality in the loss": {"orthogonality": {"text": 1.0}},
    "orthogonality decoupled": {"orthogonality": {"text": 30.0}, "decoupled": True},
}
COLLAPSED: dict[str, Fields] = {
    "none": {},
    "balance": {"balance": {"text": 0.1}},
    "bias without a loss": {"bias_update": {"text": 0.005}},
}


def sums() -> list[Fields]:
    return [{"query": f"{a} + {b} =", "response": str(a + b)} for a in range(20) for b in range(20)]


def collapse(source: Path, target: Path) -> Path:
    """The same checkpoint with routers that prefer two experts for everything."""
    model = load_model(source)
    with torch.no_grad():
        for router in router_places(model):
            router.bias[:2] += 0.5
    save_model(model, target, torch.float32)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


def mean_cosine(folder: Path) -> float:
    """Between the router rows of different experts, all text routers; absolute values."""
    found = []
    for router, place in router_places(load_model(folder)).items():
        if place.modality == "text":
            unit = F.normalize(router.weight.detach(), dim=-1)
            cosine = unit @ unit.T
            found.append(float(cosine[~torch.eye(len(cosine), dtype=torch.bool)].abs().mean()))
    return float(np.mean(found))


def train(base: Path, rows: Path, output: Path, losses: Fields, steps: int) -> Path:
    fields = {
        "stage": "text", "model": str(base), "data": [str(rows)], "output": str(output), "steps": steps,
        "max_tokens": 768, "rate": 2e-3, "warmup_steps": 10, "weight_decay": 0.0, "report_every": 10,
        "save_every": 100000, "tensorboard": False, "save_dtype": "float32", "losses": losses,
    }  # fmt: skip
    return finetune(fields, say=lambda line: None).folder


def run(folder: Path, json_file: Path | None, steps: int) -> Fields:
    base = small_checkpoint(folder / "base", 0)
    fallen = collapse(base, folder / "collapsed")
    rows = write_rows(folder / "rows.jsonl", sums())
    result: Fields = {"steps": steps, "cosine at first": round(mean_cosine(base), 4)}
    for name, losses in VARIANTS.items():
        end = train(base, rows, folder / name, losses, steps)
        loss = float(np.mean(series(folder / name, "loss")[-3:]))
        result[name] = {"mean_cosine": round(mean_cosine(end), 4), "task_loss": round(loss, 4)}
        print(name, result[name], flush=True)
    for name, losses in COLLAPSED.items():
        train(fallen, rows, folder / f"collapsed {name}", losses, 3 * steps)
        used = series(folder / f"collapsed {name}", "imbalance/text")
        loss = float(np.mean(series(folder / f"collapsed {name}", "loss")[-3:]))
        result[f"collapsed, {name}"] = {
            "most_used_over_mean": {"first": round(used[0], 3), "last": round(float(np.mean(used[-5:])), 3)},
            "task_loss": round(loss, 4),
        }
        print(name, result[f"collapsed, {name}"], flush=True)
    write_result(json_file, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/experiments/routers"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    run(options.folder, options.json, options.steps)


if __name__ == "__main__":
    main()
