"""The end of a run on disk: an adapter in PEFT's files, or a checkpoint that everything else opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from duomo.checkpoints import save_model
from duomo.train.peft import save_adapter
from duomo.train.settings import Settings
from duomo.train.stages import Trained

_NOT_COPIED = ("config.json", "SHA256SUMS", "README.md", "report.md", "model.safetensors.index.json")


def write_result(settings: Settings, trained: Trained) -> Path:
    """Returns the folder: `adapter` or `checkpoint` in the run's."""
    if trained.plan is not None:
        folder = settings.folder / "adapter"
        save_adapter(trained.model, trained.plan, folder, str(trained.folder))
        return folder
    folder = settings.folder / "checkpoint"
    dtype = torch.bfloat16 if settings.save_dtype == "bfloat16" else torch.float32
    save_model(trained.model, folder, dtype)
    copy_companions(trained.folder, folder)
    return folder


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, preprocessing and generation defaults: what lies beside weights and is not about them."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".jinja", ".txt") and file.name not in _NOT_COPIED:
            shutil.copyfile(file, target / file.name)
