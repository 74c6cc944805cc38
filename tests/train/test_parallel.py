"""Two processes over gloo: loss, gradients and weights of a step, and of a run, are those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from duomo.checkpoints import load_model
from duomo.train.forward import run_pack
from duomo.train.groups import freeze_all_but
from duomo.train.loop import finetune
from duomo.train.losses import summed_token_loss
from duomo.train.parallel import distribute
from duomo.train.processes import Processes
from duomo.train.samples import Renderer, Sample, Samples


def samples_of(checkpoint: str, files: list[str]) -> list[Sample]:
    config = load_model(checkpoint).config
    found = Samples([Path(file) for file in files], Renderer.of(Path(checkpoint), config), 512)
    return [found[index] for index in range(10)]  # six with a picture, four without


def loss_of(model: Any, chosen: list[Sample], total: int) -> torch.Tensor:
    output = run_pack(model, [s.prompt for s in chosen], [s.labels for s in chosen], always_encode=True)
    return summed_token_loss(output.logits_LV, output.labels_L) / total


def one_process(checkpoint: str, files: list[str]) -> dict[str, Any]:
    model, samples = load_model(checkpoint), samples_of(checkpoint, files)
    freeze_all_but(model, ["all"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = loss_of(model, samples, sum(s.num_supervised for s in samples))
    loss.backward()
    norm = Processes().clip(model, 0.5)
    optimizer.step()
    return {
        "loss": float(loss.detach()),
        "norm": norm,
        "weights": {n: p.detach() for n, p in model.named_parameters()},
    }


def worker(rank: int, port: int, checkpoint: str, files: list[str], out: str) -> None:
    """Process 0 has all the pictures, process 1 none: every exchange is uneven."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, samples = load_model(checkpoint), samples_of(checkpoint, files)
    freeze_all_but(model, ["all"])
    mesh = init_device_mesh("cpu", (2,))
    distribute(model, mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    own = samples[:6] if rank == 0 else samples[6:]
    total = sum(s.num_supervised for s in samples)
    loss = loss_of(model, own, total) * 2  # FSDP takes the mean over processes
    loss.backward()
    processes = Processes(rank, 2, mesh)
    norm = processes.clip(model, 0.5)
    optimizer.step()
    shared = loss.detach() / 2
    dist.all_reduce(shared)
    weights = {name: processes.whole(p, p) for name, p in model.named_parameters()}
    if rank == 0:
        torch.save({"loss": float(shared), "norm": norm, "weights": weights}, out)
    dist.destroy_process_group()


def test_two_processes_step_as_one(
    checkpoint: Path, text_rows: Path, picture_rows: Path, tmp_path: Path
) -> None:
    files = [str(picture_rows), str(text_rows)]
    wanted = one_process(str(checkpoint), files)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    out = str(tmp_path / "found.pt")
    mp.spawn(worker, (port, str(checkpoint), files, out), nprocs=2)
    found = torch.load(out, weights_only=True)
    assert abs(found["loss"] - wanted["loss"]) < 1e-5
    assert abs(found["norm"] - wanted["norm"]) < 1e-5 * wanted["norm"]
    assert found["weights"].keys() == wanted["weights"].keys()
    before = dict(load_model(checkpoint).named_parameters())
    for name, value in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], value, atol=1e-5), name
        # Vision tokens of the last layer reach no loss: only later text does, through attention.
        if not name.endswith("router.bias") and "layers.2.mlp.vision" not in name:
            assert not torch.equal(value, before[name]), f"{name} did not move, so it proves nothing"


def duomo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "duomo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture
def recipe(checkpoint: Path, text_rows: Path, picture_rows: Path, tmp_path: Path) -> Path:
    """Router terms, nudged biases and two packs a step, some with pictures and some without."""
    fields = {
        "stage": "sft", "model": str(checkpoint), "data": [str(picture_rows), str(text_rows)], "steps": 4,
        "output": "run", "max_tokens": 128, "packs_per_step": 2, "rate": 1e-3, "clip": 0.5, "save_every": 2,
        "report_every": 1, "tensorboard": False, "save_dtype": "float32", "eval_data": [str(text_rows)],
        "eval_every": 4, "losses": {"balance": 0.01, "router_z": 1e-3, "orthogonality": 1e-3,
        "bias_update": 1e-3},
    }  # fmt: skip
    path = tmp_path / "recipe.json"  # every JSON file is YAML
    path.write_text(json.dumps(fields))
    return path


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Stop(Exception):
    """Stands for a kill after a step that was not saved."""


def stop_at_three(line: str) -> None:
    if line.startswith("step 3/"):
        raise Stop


def test_a_run_may_go_on_in_two_processes(recipe: Path, tmp_path: Path) -> None:
    """One process throughout; two throughout; stopped in one, gone on with in two."""
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    finetune(recipe, f"output={one}", say=lambda line: None)
    with pytest.raises(Stop):
        finetune(recipe, f"output={both}", say=stop_at_three)
    for folder in (two, both):
        done = duomo("train", str(recipe), "--processes", "2", f"output={folder}")
        assert done.returncode == 0, done.stderr
        assert curve(folder) == pytest.approx(curve(one), abs=1e-5)
        found, wanted = (dict(load_model(f / "checkpoint").named_parameters()) for f in (folder, one))
        assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in wanted.items())
    assert "goes on after step 2 of 4" in done.stderr


@pytest.mark.parametrize("kind", ["adapter", "preferences", "rewards", "muon"])
def test_what_every_process_holds_whole_trains_as_one(
    recipe: Path, text_rows: Path, tmp_path: Path, kind: str
) -> None:
    """The same curve, and the same weights but for the order of additions, in one process and in two."""
    more = {
        "adapter": ["lora={ranks: {attention: 4, text_experts: 2}}"],
        "preferences": ["stage=dpo", f"data={tmp_path / 'pairs.jsonl'}", "preference={loss: sigmoid}"],
        "rewards": [
            "stage=grpo", f"data={text_rows}", "packing=none", "steps=3",
            "grpo={group_size: 4, max_new_tokens: 3, reward: contains, kl: 0.1}",
        ],
        "muon": ["optimizer=muon"],
    }[kind]  # fmt: skip
    pairs = [
        {"src": [f"{a} + {b} ="], "tgt": [], "response": [[str(a + b)], [str(a)]], "sort": [1, 0]}
        for a in range(1, 4)
        for b in range(1, 5)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    more = [*more, "eval_data=", "eval_every=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    finetune(recipe, *more, f"output={one}", say=lambda line: None)
    done = duomo("train", str(recipe), "--processes", "2", *more, f"output={two}")
    assert done.returncode == 0, done.stderr
    assert curve(two) == pytest.approx(curve(one), abs=1e-4)
    folder = "adapter" if kind == "adapter" else "checkpoint"
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    found, wanted = (load_file(run / folder / name) for run in (two, one))
    assert found.keys() == wanted.keys()
    # Muon's directions of least momentum hang on the last bits of it.
    tolerance = 2e-3 if kind == "muon" else 1e-4
    assert all(torch.allclose(found[key], value, atol=tolerance) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("packs_per_step=3", "packs_per_step=3 is no multiple of 2"),
        ("model=nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(recipe: Path, override: str, said: str) -> None:
    done = duomo("train", str(recipe), "--processes", "2", override)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("duomo: ") == 1
