"""A checkpoint a piece at a time: any module of ours filled from disk, and nothing else held in memory.

What quantizing a model larger than memory needs. Also the quantized folder back into a plain model, which is
the reference for every packed kernel. Names and shapes are checked before the first piece is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from duomo.checkpoints import load as loading
from duomo.checkpoints.files import TensorStore
from duomo.model import Ernie

M = TypeVar("M", bound=nn.Module)


class CheckpointStream:
    """PT, Paddle or native: `fill(module, prefix)` reads the parameters `prefix` + the module's own names."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._store = TensorStore(self.folder)
        config = loading.load_config(self.folder)
        self.config, _, self._places = loading.place_entries(config, self._store)
        loading.check_names(self._store, self._places)

    def fill(self, module: M, prefix: str) -> M:
        """Copies the module's parameters from disk, into whatever dtype they have."""
        parameters = {f"{prefix}{name}": value for name, value in module.named_parameters()}
        with torch.no_grad():
            for entry, place in self._places.items():
                if entry.ours in parameters:
                    own = loading._fit(entry, place, self._store.read(place.name), parameters[entry.ours])
                    own[1].copy_(own[0])
        return module


def is_quantized(folder: str | Path) -> bool:
    """Whether config.json says that the weights beside it are in duomo's quantized format."""
    return "quantization" in loading.read_config(folder)


def load_dequantized(folder: str | Path, dtype: torch.dtype | None = None) -> Ernie:
    """The plain model that a quantized folder stands for: every weight decoded; bf16 by default."""
    config = loading.load_config(folder)
    return loading.load_quantized(Path(folder), config, dtype or torch.bfloat16, "cpu")
