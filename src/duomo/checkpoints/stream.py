"""A checkpoint a piece at a time: any module of ours filled from disk, and nothing else held in memory.

What quantizing a model larger than memory needs. Also the quantized folder back into a plain model, which is
the reference for every packed kernel. Names and shapes are checked before the first piece is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from duomo.checkpoints import load as loading
from duomo.checkpoints.checksums import Checksums
from duomo.checkpoints.files import TensorStore
from duomo.checkpoints.names import Entry, pt_entries
from duomo.checkpoints.quantized import dequantize, open_quantized
from duomo.errors import CheckpointError
from duomo.model import Ernie, ModelConfig

M = TypeVar("M", bound=nn.Module)


class CheckpointStream:
    """PT, Paddle or native: `fill(module, prefix)` reads the parameters `prefix` + the module's own names.

    Where the folder has SHA256SUMS, each file is compared with it before its first tensor is read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checksums = Checksums.of(self.folder)
        self.checksums.compare_small()
        self._store = TensorStore(self.folder, self.checksums.compare)
        try:
            config = loading.load_config(self.folder)
            self.config, _, self._places = loading.place_entries(config, self._store)
            loading.check_names(self._store, self._places)
        except CheckpointError:
            self.checksums.compare_all(
                file.path for file in self._store.files
            )  # a damaged header is no riddle
            raise

    def fill(self, module: M, prefix: str) -> M:
        """Copies the module's parameters from disk, into whatever dtype they have."""
        parameters = {f"{prefix}{name}": value for name, value in module.named_parameters()}
        with torch.no_grad():
            for entry, place in self._places.items():
                if entry.ours in parameters:
                    own = loading._fit(entry, place, self._store.read(place.name), parameters[entry.ours])
                    own[1].copy_(own[0])
        return module

    def tensors(self) -> Iterator[tuple[Entry, Tensor]]:
        """Every entry of the PT layout with its tensor, one at a time; biases are rows of one PT tensor."""
        with torch.device("meta"):
            parameters = dict(Ernie(self.config).named_parameters())
        for entry, place in self._places.items():
            yield entry, loading._fit(entry, place, self._store.read(place.name), parameters[entry.ours])[0]


def dequantized_tensors(folder: Path, config: ModelConfig) -> Iterator[tuple[Entry, Tensor]]:
    """The same of a quantized folder, every weight decoded to fp32; one of ours in memory at a time."""
    files = open_quantized(folder)
    loading.check_quantized(config, files)
    name, tensor = "", torch.empty(0)
    for entry in pt_entries(config):
        if entry.ours != name:
            name, tensor = entry.ours, dequantize(files[entry.ours].read(entry.ours))
        yield entry, entry.view(tensor)


def is_quantized(folder: str | Path) -> bool:
    """Whether config.json says that the weights beside it are in duomo's quantized format."""
    return "quantization" in loading.read_config(folder)


def load_dequantized(folder: str | Path, dtype: torch.dtype | None = None) -> Ernie:
    """The plain model that a quantized folder stands for: every weight decoded; bf16 by default."""
    config = loading.load_config(folder)
    return loading.load_quantized(Path(folder), config, dtype or torch.bfloat16, "cpu")
