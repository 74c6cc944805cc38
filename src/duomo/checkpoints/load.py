"""A checkpoint into a model, tensor by tensor: never more than one tensor beyond the model itself.

Names and shapes are checked before the first weight is copied. Routers and their correction biases stay
fp32 whatever dtype is asked for: rounded, they would choose other experts (spec section 7, item 6).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duomo.checkpoints.dialects import Dialect, Native, Place, recognise
from duomo.checkpoints.files import TensorStore
from duomo.checkpoints.names import Entry, pt_entries
from duomo.checkpoints.quantized import QuantizedFile, dequantize, open_quantized
from duomo.errors import CheckpointError, ConfigError, MissingTensor, ShapeMismatch, UnexpectedTensor
from duomo.model import Ernie, ModelConfig
from duomo.model.packed import build_packed

VERIFY_BYTES = 1 << 30  # larger folders are not read whole to compare checksums
SHOWN = 5  # names listed in an error; all are counted


def load_config(folder: str | Path) -> ModelConfig:
    """config.json of a checkpoint. CheckpointError if there is none, ConfigError if it cannot be right."""
    return ModelConfig.from_json(read_config(folder))


def read_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} has no config.json; give the folder of a checkpoint") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return fields


def load_model(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", is_read_only: bool = False
) -> Ernie:
    """The model of a folder, ready to run. `dtype` None keeps the dtype of the file's embeddings.

    A quantized folder stays packed and memory-mapped; `dtype` is then of activations (None: float32). Its
    checksums are compared if it is small; for a large one `duomo inspect --verify` reads every byte.
    `is_read_only`: nobody will write to a parameter, so plain tensors of a quantized folder lie in the file
    too, and a router for pictures is no more in memory than its experts; writing to one ends the process.
    """
    folder = Path(folder)
    config = replace(load_config(folder), name=folder.resolve().name)
    if "quantization" in read_config(folder):
        if device != "cpu":
            return load_quantized(folder, config, dtype or torch.float32, device)
        return load_packed(folder, config, dtype or torch.float32, is_read_only)
    store = TensorStore(folder)
    config, _, places = place_entries(config, store)
    check_names(store, places)
    with torch.device("meta"):
        model = Ernie(config)
    parameters = dict(model.named_parameters())
    for entry, place in places.items():  # shapes alone: nothing is read or allocated yet
        shape = store.entry(place.name).shape
        _fit(entry, place, torch.empty(shape, device="meta"), parameters[entry.ours])
    dtype = dtype or store.entry(next(iter(places.values())).name).dtype  # of the embeddings
    _materialise(model, dtype, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry, place in places.items():
            stored, target = _fit(entry, place, store.read(place.name), parameters[entry.ours])
            target.copy_(stored)
    return model.eval()


def place_entries(config: ModelConfig, store: TensorStore) -> tuple[ModelConfig, Dialect, dict[Entry, Place]]:
    """Where each tensor of the PT layout is found; the config says afterwards whether the head is its own."""
    dialect = recognise(store, config)
    config = _settle_head(config, store, dialect)
    return config, dialect, {entry: _place(dialect, entry) for entry in pt_entries(config)}


def _place(dialect: Dialect, entry: Entry) -> Place:
    row = entry.row
    if row is None:
        return dialect.place(entry.name)
    if isinstance(dialect, Native):
        return Place(dialect.bias(entry.name, row), lambda tensor: tensor.reshape(-1))
    name = dialect.place(entry.name).name
    return Place(name, lambda tensor: tensor.reshape(-1, tensor.shape[-1])[row])


def load_packed(folder: Path, config: ModelConfig, dtype: torch.dtype, is_read_only: bool = False) -> Ernie:
    """A quantized folder as it is: kernels read the file's own pages, and only those they need."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    files = open_quantized(folder, verify=size <= VERIFY_BYTES)
    check_quantized(config, files)
    with warnings.catch_warnings():
        # The mapping is read-only and so are the kernels; torch warns of any array that is.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        stored = ((name, file.read(name, borrows=is_read_only)) for name, file in files.items())
        return build_packed(config, stored, dtype)


def check_quantized(config: ModelConfig, files: Mapping[str, QuantizedFile]) -> None:
    """Names and shapes of a quantized folder against the config."""
    with torch.device("meta"):
        model = Ernie(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    compare_names(set(shapes), set(files))
    for name, expected in shapes.items():
        found = files[name].shape(name)
        if found != expected:
            said = f"tensor {name} has shape {found}; the config asks for {expected}"
            raise ShapeMismatch(said, tensor=name, expected=expected, found=found)


def load_quantized(folder: Path, config: ModelConfig, dtype: torch.dtype, device: str) -> Ernie:
    """A quantized folder with every weight decoded: the reference that packed kernels are judged by."""
    files = open_quantized(folder)
    check_quantized(config, files)
    with torch.device("meta"):
        model = Ernie(config)
    _materialise(model, dtype, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dequantize(files[name].read(name)))
    return model.eval()


def _settle_head(config: ModelConfig, store: TensorStore, dialect: Dialect) -> ModelConfig:
    """A tied model may carry its head too: the same values are an alias, others a head of its own."""
    if not config.tie_embeddings or "lm_head.weight" not in store:
        return config
    embed = dialect.place("model.embed_tokens.weight")
    if embed.name not in store:
        return config  # reported as missing with the rest
    head = dialect.place("lm_head.weight")
    is_copy = torch.equal(head.turn(store.read(head.name)), embed.turn(store.read(embed.name)))
    return config if is_copy else replace(config, tie_embeddings=False)


def check_names(store: TensorStore, places: dict[Entry, Place]) -> None:
    """MissingTensor and UnexpectedTensor, which count all and name the first few."""
    compare_names({place.name for place in places.values()}, set(store))


def compare_names(wanted: set[str], stored: set[str]) -> None:
    missing = sorted(wanted - stored)
    if missing:
        raise MissingTensor(_counted(missing, "tensor is missing", "tensors are missing"), tensors=missing)
    unexpected = sorted(name for name in stored - wanted if not _is_ignored(name))
    if unexpected:
        raise UnexpectedTensor(
            _counted(unexpected, "tensor belongs to no part", "tensors belong to no part") + " of this model",
            tensors=unexpected,
        )


def _counted(names: Sequence[str], one: str, many: str) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = ", ".join(names[:SHOWN]) + rest
    return f"{len(names)} {one if len(names) == 1 else many} ({listed})"


def _is_ignored(name: str) -> bool:
    """Multi-token prediction heads (trained with, never used here), a tied head's copy, derived buffers."""
    return "mtp" in name or name == "lm_head.weight" or name.endswith("inv_freq")


def _materialise(model: Ernie, dtype: torch.dtype, device: str) -> None:
    for name, parameter in list(model.named_parameters()):
        kept = torch.float32 if ".router." in name else dtype
        home = model.get_submodule(name.rpartition(".")[0])
        empty = torch.empty(parameter.shape, dtype=kept, device=device)
        setattr(home, name.rpartition(".")[2], nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _fit(entry: Entry, place: Place, stored: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """What to copy and where to. ShapeMismatch if one does not fit the other."""
    target, found = entry.view(parameter), tuple(stored.shape)
    try:
        turned = place.turn(stored)
    except (IndexError, RuntimeError) as error:
        raise _mismatch(entry, place, found, target) from error
    # The text model's router is stored [out, in] by transformers and [in, out] by Baidu.
    if turned.shape != target.shape and ".gate.weight" in entry.name and turned.T.shape == target.shape:
        turned = turned.T
    if turned.shape != target.shape:
        raise _mismatch(entry, place, found, target)
    return turned, target


def _mismatch(entry: Entry, place: Place, found: tuple[int, ...], target: Tensor) -> ShapeMismatch:
    expected = tuple(target.shape)
    said = f"tensor {place.name} has shape {found}"
    said += f"; the config asks for {expected}"
    if place.name != entry.name:
        said += f" of {entry.name} in it"
    return ShapeMismatch(said, tensor=place.name, expected=expected, found=found)
