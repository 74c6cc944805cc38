"""The end of a run on disk: an adapter in PEFT's files, or a checkpoint that everything else opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from duomo.checkpoints import save_model
from duomo.train.peft import save_adapter
from duomo.train.processes import Processes
from duomo.train.settings import Settings
from duomo.train.stages import Trained, open_trained
from duomo.train.state import changing

_NOT_COPIED = ("config.json", "SHA256SUMS", "README.md", "report.md", "model.safetensors.index.json")


def write_result(settings: Settings, trained: Trained, processes: Processes) -> Path:
    """Returns the folder: `adapter` or `checkpoint` in the run's. Of several processes the first writes."""
    if processes.is_parted:
        return _write_whole(settings, trained, processes)
    folder = settings.folder / ("checkpoint" if trained.plan is None else "adapter")
    if processes.rank == 0:
        _write(settings, trained, folder)
    processes.wait()
    return folder


def _write(settings: Settings, trained: Trained, folder: Path) -> None:
    if trained.plan is not None:
        save_adapter(trained.model, trained.plan, folder, str(trained.folder))
        return
    dtype = torch.bfloat16 if settings.save_dtype == "bfloat16" else torch.float32
    save_model(trained.model, folder, dtype)
    copy_companions(trained.folder, folder)


@torch.no_grad()
def _write_whole(settings: Settings, trained: Trained, processes: Processes) -> Path:
    """The parts of all processes, put together in a model that lies in none of them."""
    model = trained.model
    found = {name: processes.whole(p, p) for name, p in changing(model).items()}
    if processes.rank == 0:
        opened = open_trained(settings, lambda line: None)
        parameters = dict(opened.model.named_parameters())
        for name, value in found.items():
            parameters[name].copy_(value)
        write_result(settings, opened, Processes())
    processes.wait()
    return settings.folder / "checkpoint"


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, preprocessing and generation defaults: what lies beside weights and is not about them."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".jinja", ".txt") and file.name not in _NOT_COPIED:
            shutil.copyfile(file, target / file.name)
