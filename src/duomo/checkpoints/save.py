"""A model onto disk in the PT layout, in shards, each in place only when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from duomo.checkpoints.files import INDEX_NAME
from duomo.checkpoints.names import pt_entries
from duomo.errors import CheckpointError
from duomo.model import Ernie, ModelConfig
from duomo.model.ernie import Embedding

MAX_SHARD_BYTES = 5 << 30


def save_model(
    model: Ernie, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """config.json and weights. `dtype` None keeps the model's; routers and their biases are always fp32."""
    if not isinstance(model.embed, Embedding):
        raise CheckpointError("this model's weights are packed; the PT layout is written from plain ones")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(model.config, folder, dtype or model.embed.weight.dtype)
    write_tensors(pt_tensors(model, dtype), folder, max_shard_bytes)


def write_config(config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    fields = {**config.to_json(), "torch_dtype": str(dtype).split(".")[1]}
    _write_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")


def write_tensors(
    tensors: Iterator[tuple[str, Tensor]], folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Tensors as they come into shards, each named when all are whole; at most one shard is in memory."""
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        partial = folder / f"shard-{len(written)}.partial"
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, partial, {"format": "pt"})
        written.append((partial, list(shard)))
        total += sum(tensor.nbytes for tensor in shard.values())
    weight_map: dict[str, str] = {}
    files = []
    for number, (partial, names) in enumerate(written, start=1):
        name = "model.safetensors"
        if len(written) > 1:
            name = f"model-{number:05d}-of-{len(written):05d}.safetensors"
        os.replace(partial, folder / name)
        files.append(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return files


def pt_tensors(model: Ernie, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the PT layout, one at a time; a model's biases become rows of one tensor."""
    parameters = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {}
    for entry in pt_entries(model.config):
        parameter = parameters[entry.ours].detach().cpu()
        if entry.row is not None:
            rows.setdefault(entry.name, []).append(parameter)
            continue
        kept = torch.float32 if ".router." in entry.ours else dtype or parameter.dtype
        yield entry.name, entry.view(parameter).to(kept)
    for name, biases in rows.items():
        yield name, torch.stack(biases)


def _shards(tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
