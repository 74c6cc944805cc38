"""Two processes over gloo: the loss, the gradients and the weights after a step of one process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from duomo.checkpoints import load_model
from duomo.train.forward import run_pack
from duomo.train.groups import freeze_all_but
from duomo.train.losses import summed_token_loss
from duomo.train.parallel import PlacedBank, clip_, distribute, whole
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
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
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
    distribute(model, init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    own = samples[:6] if rank == 0 else samples[6:]
    total = sum(s.num_supervised for s in samples)
    loss = loss_of(model, own, total) * 2  # FSDP takes the mean over processes
    loss.backward()
    norm = clip_(model, 0.5)
    optimizer.step()
    shared = loss.detach() / 2
    dist.all_reduce(shared)
    weights: dict[str, torch.Tensor] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = whole(parameter.detach())
            if isinstance(module, PlacedBank):
                parts = [torch.empty_like(value) for _ in range(2)]
                dist.all_gather(parts, value)
                value = torch.cat(parts)
            weights[f"{module_name}.{name}"] = value
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
    assert abs(found["norm"] - wanted["norm"]) < 1e-4 * wanted["norm"]
    assert found["weights"].keys() == wanted["weights"].keys()
    before = dict(load_model(checkpoint).named_parameters())
    for name, value in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], value, atol=1e-5), name
        # Vision tokens of the last layer reach no loss: only later text does, through attention.
        if not name.endswith("router.bias") and "layers.2.mlp.vision" not in name:
            assert not torch.equal(value, before[name]), f"{name} did not move, so it proves nothing"
