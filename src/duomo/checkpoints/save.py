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
from duomo.model import Ernie
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
    config = {**model.config.to_json(), "torch_dtype": str(dtype or model.embed.weight.dtype).split(".")[1]}
    _write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    shards = list(_shards(pt_tensors(model, dtype), max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        partial = folder / f"{name}.partial"
        save_file({key: tensor.contiguous() for key, tensor in shard.items()}, partial, {"format": "pt"})
        os.replace(partial, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


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
