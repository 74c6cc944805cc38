"""A recipe run from the outside: it learns, only what it names changes, and a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import duomo
from duomo.checkpoints import load_model
from duomo.errors import TrainingError
from duomo.train.groups import group_of
from duomo.train.loop import finetune
from duomo.train.stages import STAGE_GROUPS

ROOT = Path(__file__).parents[2]


def silent(line: str) -> None:
    """Progress that nobody reads."""


def recipe(checkpoint: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    common = {
        "stage": "sft", "model": str(checkpoint), "data": [str(data)], "output": str(output), "steps": 4,
        "max_tokens": 256, "rate": 3e-3, "save_every": 2, "report_every": 2, "tensorboard": False,
        "save_dtype": "float32",
    }  # fmt: skip
    return {**common, **more}


def hashes(folder: Path) -> dict[str, str]:
    model = load_model(folder)
    return {n: sha256(p.detach().numpy().tobytes()).hexdigest() for n, p in model.named_parameters()}


def test_it_learns_and_says_so(checkpoint: Path, text_rows: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    fields = recipe(
        checkpoint, text_rows, tmp_path / "run", steps=12, eval_data=[str(text_rows)], eval_every=6
    )
    result = finetune(fields, say=lines.append)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert result.evaluation is not None and result.evaluation.loss < rows[0]["loss"]
    assert any("tokens/s" in line and "left" in line for line in lines)
    usage = rows[-1]["usage"]["text"]
    assert len(usage) == 2 and all(abs(sum(layer) - 1) < 1e-3 for layer in usage)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "refresh" not in page and "text experts" in page and "loss: " in page
    assert (result.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize("stage", ["text", "vision"])
def test_a_stage_changes_its_groups_and_nothing_else(
    stage: str, checkpoint: Path, text_rows: Path, picture_rows: Path, tmp_path: Path
) -> None:
    data = text_rows if stage == "text" else picture_rows
    losses = {
        "balance": 0.01,
        "router_z": 1e-3,
        "orthogonality": 1e-3,
        "decoupled": True,
        "bias_update": 0.01,
    }
    fields = recipe(checkpoint, data, tmp_path / "run", stage=stage, losses=losses)
    before, after = hashes(checkpoint), hashes(finetune(fields, say=silent).folder)
    changed = {group_of(name) for name in before if before[name] != after[name]}
    assert changed == set(STAGE_GROUPS[stage])
    if stage == "vision":  # a text prompt is answered as before, to the bit
        one, other = load_model(checkpoint), load_model(tmp_path / "run" / "checkpoint")
        assert torch.equal(one.logits(list(range(9, 40))), other.logits(list(range(9, 40))))


def test_groups_by_name_and_a_router_rate_that_is_a_hundredth(
    checkpoint: Path, text_rows: Path, tmp_path: Path
) -> None:
    """AdamW's first step is the rate itself in every entry that has a gradient."""
    fields = recipe(
        checkpoint, text_rows, tmp_path / "run", train=["routers", "attention"], rates={"routers": 0.01},
        steps=1, weight_decay=0.0, schedule="constant",
    )  # fmt: skip
    folder = finetune(fields, say=silent).folder
    before, after = load_model(checkpoint), load_model(folder)
    moved: dict[str, float] = {}
    for (name, one), (_, other) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        moved[group_of(name)] = max(moved.get(group_of(name), 0.0), float((one - other).detach().abs().max()))
    assert {group for group, most in moved.items() if most} == {"text_routers", "attention"}
    assert moved["attention"] == pytest.approx(3e-3, rel=1e-2)
    assert moved["text_routers"] == pytest.approx(3e-5, rel=1e-2)


KILLED = """
import os, signal, sys
from duomo.train import loop, state
whole = state.save_state
def save_and_die(*arguments):
    whole(*arguments)
    if arguments[1] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
loop.save_state = save_and_die
loop.finetune(sys.argv[1], say=lambda line: None)
"""


@pytest.mark.parametrize("kind", ["sft", "dpo", "lora"])
def test_killed_and_resumed_ends_with_the_same_bits(
    kind: str, checkpoint: Path, text_rows: Path, tmp_path: Path
) -> None:
    """Optimizer, random state, data cursor, router bias: two packs a step, several epochs."""
    data, more = text_rows, {"losses": {"bias_update": 0.01, "balance": 0.01}, "packs_per_step": 2}
    if kind == "dpo":
        data = tmp_path / "pairs.jsonl"
        pairs = [{"question": f"say {i}", "chosen": "good", "rejected": f"bad {i}"} for i in range(9)]
        data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        more["stage"] = "dpo"
    if kind == "lora":
        more["lora"] = {"ranks": {"attention": 2, "text_experts": 1}}
    files = []
    for name in ("whole", "killed"):
        file = tmp_path / f"{name}.json"  # JSON is YAML
        file.write_text(json.dumps(recipe(checkpoint, data, tmp_path / name, steps=6, **more)))
        files.append(file)
    whole = finetune(files[0], say=silent)
    command = [sys.executable, "-c", KILLED, str(files[1]), "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("*/*.safetensors"))
    resumed = finetune(files[1], say=silent)
    for file in whole.folder.glob("*.safetensors"):
        assert file.read_bytes() == (resumed.folder / file.name).read_bytes()
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "killed")]
    for name, value in states[0]["parameters"].items():
        assert torch.equal(value, states[1]["parameters"][name]), name
    biases = [v for n, v in states[0]["parameters"].items() if n.endswith(".router.bias") and ".text." in n]
    assert biases and (kind == "lora" or all(not torch.equal(b, torch.zeros_like(b)) for b in biases))
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    losses = [[json.loads(line)["loss"] for line in found] for found in lines]
    assert losses[0] == losses[1]


def test_other_settings_do_not_go_on_with_a_run(checkpoint: Path, text_rows: Path, tmp_path: Path) -> None:
    fields = recipe(checkpoint, text_rows, tmp_path / "run")
    finetune(fields, say=silent)
    with pytest.raises(TrainingError, match=r"rate=0\.003, not 0\.1"):
        finetune(fields, "rate=0.1", say=silent)


def test_what_cannot_be_learned_is_refused(checkpoint: Path, text_rows: Path, tmp_path: Path) -> None:
    fields = recipe(checkpoint, text_rows, tmp_path / "run")
    for override, said in [
        ("stage=dpo", "text.jsonl:1: dpo needs rows with a rejected answer"),
        ("stage=thinking", "no row has one"),
        ("stage=vision", "needs rows with pictures"),
        ("max_tokens=8", "40 rows are bad: text.jsonl:1: .* at most 8"),
        ("train=[experts]", "'experts' is unknown"),
        ("rates={resampler2: 1}", "'resampler2' is unknown"),
        ("lora={ranks: {routers: 1}}", "no adapter is possible"),
    ]:
        with pytest.raises(TrainingError, match=said):
            finetune(fields, override, say=silent)


def test_vision_experts_start_as_their_text_experts(
    checkpoint: Path, picture_rows: Path, tmp_path: Path
) -> None:
    fields = recipe(
        checkpoint, picture_rows, tmp_path / "run", vision_from_text=True, train=["embeddings"], steps=1
    )
    model = load_model(finetune(fields, say=silent).folder)
    bank = model.decoder.layers[1].mlp
    size, width = bank.vision.down.shape[2], bank.text.down.shape[2]
    assert torch.equal(bank.vision.gate_up[3, :size], bank.text.gate_up[3, :size])
    assert torch.equal(bank.vision.gate_up[3, size:], bank.text.gate_up[3, width : width + size])
    assert torch.allclose(bank.vision.down[3] * 6, bank.text.down[3, :, :size])


def test_finetune_is_a_public_name() -> None:
    assert duomo.finetune is finetune


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of TensorBoard's files by name and step. A record is a length, its sum, the event, its sum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for file in folder.iterdir():
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
            place += size + 16
    return found


def test_tensorboard_holds_what_the_metrics_hold(checkpoint: Path, text_rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fields = recipe(checkpoint, text_rows, folder, eval_data=[str(text_rows)], eval_every=4, tensorboard=True)
    finetune(fields, say=silent)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = events(folder / "tensorboard")
    assert {"loss", "rate", "accuracy", "evaluation/answers_right", "gradient_norm"} <= found.keys()
    assert found["loss"] == pytest.approx({row["step"]: row["loss"] for row in rows}, rel=1e-6)
