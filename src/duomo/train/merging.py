"""Weights to weights, shard by shard: an adapter folded into its base, or a checkpoint written anew.

Nothing of the model is built: a tensor is read, changed and written, so merging the 28B takes the memory of
one shard. A 2-bit base is decoded as it goes by; the result is plain, for `duomo quantize` to pack again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from duomo.checkpoints.adapters import AdapterFile, open_adapter
from duomo.checkpoints.load import load_config
from duomo.checkpoints.names import Entry
from duomo.checkpoints.save import MAX_SHARD_BYTES, write_config, write_tensors
from duomo.checkpoints.stream import CheckpointStream, dequantized_tensors, is_quantized
from duomo.errors import TrainingError, UnexpectedTensor
from duomo.train.finish import copy_companions


def write_checkpoint(
    source: Path,
    target: Path,
    adapter: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """`source` in the PT layout at `target`, with an adapter added to its weights if one is given.

    `dtype` None keeps a plain source's, and is bfloat16 for a quantized one; routers stay fp32. Returns the
    weight files. UnexpectedTensor names a module of the adapter that the model does not have.
    """
    if target.is_dir() and any(target.glob("*.safetensors")):
        raise TrainingError(f"{target} has weights already; give a new folder")
    added = open_adapter(adapter) if adapter else None
    if is_quantized(source):
        config, entries = load_config(source), dequantized_tensors(source, load_config(source))
        dtype = dtype or torch.bfloat16
    else:
        stream = CheckpointStream(source)
        config, entries = stream.config, stream.tensors()
    target.mkdir(parents=True, exist_ok=True)
    files = write_tensors(_changed(entries, added, dtype), target, max_shard_bytes)
    write_config(replace(config, name=""), target, dtype or _stored_dtype(files[0]))
    copy_companions(source, target)
    if added is not None and added.unused():
        name = added.unused()[0]
        raise UnexpectedTensor(f"the adapter has {name}, which this model does not", name=name)
    return files


def _changed(
    entries: Iterator[tuple[Entry, Tensor]], added: AdapterFile | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    rows: dict[str, list[Tensor]] = {}
    for entry, tensor in entries:
        if entry.row is not None:
            rows.setdefault(entry.name, []).append(tensor.float())
            continue
        delta = added.take(entry.name.removesuffix(".weight")) if added else None
        kept = torch.float32 if ".router." in entry.ours else dtype or tensor.dtype
        if delta is not None:
            tensor = tensor.float() + delta
        yield entry.name, tensor.to(kept).clone()
    for name, biases in rows.items():
        yield name, torch.stack(biases)


def _stored_dtype(file: Path) -> torch.dtype:
    from duomo.checkpoints.files import SafetensorsFile

    found = SafetensorsFile(file).entries
    return next(e.dtype for name, e in found.items() if name == "model.embed_tokens.weight")


def sources_of(folder: Path) -> tuple[Path, Path | None]:
    """(checkpoint, adapter) of what people point at: a run's folder, an adapter's, or a checkpoint."""
    for place in (folder / "checkpoint", folder):
        if (place / "config.json").is_file():
            return place, None
    for place in (folder / "adapter", folder):
        file = place / "adapter_config.json"
        if file.is_file():
            base = str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path", ""))
            if not base or not Path(base).is_dir():
                raise TrainingError(
                    f"{place} is an adapter on {base or 'an unnamed base'}, which is not here; merge it "
                    "with `duomo merge BASE ADAPTER TARGET`"
                )
            return Path(base), place
    raise TrainingError(f"{folder} is no run, checkpoint or adapter")
