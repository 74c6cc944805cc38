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
from duomo.checkpoints.dialects import recognise
from duomo.checkpoints.files import TensorStore
from duomo.checkpoints.names import pt_entries
from duomo.checkpoints.quantized import dequantize, open_quantized
from duomo.errors import MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.model import Ernie

M = TypeVar("M", bound=nn.Module)


class CheckpointStream:
    """PT, Paddle or native: `fill(module, prefix)` reads the parameters `prefix` + the module's own names."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._store = TensorStore(self.folder)
        config = loading.load_config(self.folder)
        dialect = recognise(self._store, config)
        self.config = loading._settle_head(config, self._store, dialect)
        self._places = {entry: loading._place(dialect, entry) for entry in pt_entries(self.config)}
        loading._check_names(self._store, self._places)

    def fill(self, module: M, prefix: str) -> M:
        """Copies the module's parameters from disk, into whatever dtype they have."""
        parameters = {f"{prefix}{name}": value for name, value in module.named_parameters()}
        with torch.no_grad():
            for entry, place in self._places.items():
                if entry.ours in parameters:
                    stored = place.turn(self._store.read(place.name))
                    loading._copy(entry, stored, parameters[entry.ours])
        return module


def is_quantized(folder: str | Path) -> bool:
    """Whether config.json says that the weights beside it are in duomo's quantized format."""
    return "quantization" in loading.read_config(folder)


def load_dequantized(folder: str | Path, dtype: torch.dtype | None = None) -> Ernie:
    """The plain model that a quantized folder stands for: every weight decoded. bf16 unless told otherwise."""
    config = loading.load_config(folder)
    with torch.device("meta"):
        model = Ernie(config)
    loading._materialise(model, dtype or torch.bfloat16, "cpu")
    parameters, homes = dict(model.named_parameters()), open_quantized(folder)
    missing, unexpected = sorted(set(parameters) - set(homes)), sorted(set(homes) - set(parameters))
    if missing:
        raise MissingTensor(loading._counted(missing, "tensor is missing", "tensors are missing"))
    if unexpected:
        raise UnexpectedTensor(
            loading._counted(unexpected, "tensor belongs to no part", "tensors belong to no part")
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if homes[name].shape(name) != tuple(parameter.shape):
                raise ShapeMismatch(
                    f"tensor {name} has shape {homes[name].shape(name)}; "
                    f"the config asks for {tuple(parameter.shape)}",
                    tensor=name,
                )
            parameter.copy_(dequantize(homes[name].read(name)))
    return model.eval()
