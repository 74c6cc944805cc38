"""safetensors files, memory-mapped: one tensor at a time, and every kind of damage told by name.

The header is checked here before any byte is trusted: lengths, offsets, overlaps, dtypes. Nothing is ever
unpickled. Paddle writes bfloat16 as U16; that is read as what it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duomo.errors import CheckpointError, CorruptFile, MissingTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100 << 20
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One file. Opening checks the header; `read` returns a tensor that shares the mapped pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{path.name} cannot be opened: {error.strerror}", file=str(path)
            ) from error
        self.entries = self._parse()
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write: torch wants writable memory

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=entry.dtype)
        raw = torch.from_numpy(self._bytes[entry.start : entry.stop])
        # A mapping is only as aligned as the file; views of wider types need their own alignment.
        if entry.start % entry.dtype.itemsize:
            raw = raw.clone()
        return raw.view(entry.dtype).view(entry.shape)

    def _parse(self) -> dict[str, Entry]:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if self._size < 8 or length > min(MAX_HEADER_BYTES, self._size - 8):
                raise self._corrupt("the header is longer than the file: it was cut off or is no safetensors")
            try:
                header: dict[str, Any] = json.loads(file.read(length))
            except ValueError as error:
                raise self._corrupt(f"the header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._corrupt("the header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}
        self._check_overlaps(entries)
        return entries

    def _entry(self, name: str, fields: Any, base: int) -> Entry:
        try:
            dtype, shape = DTYPES[fields["dtype"]], tuple(int(n) for n in fields["shape"])
            start, stop = (base + int(offset) for offset in fields["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._corrupt(f"tensor {name}: its header entry is not readable ({error})", name) from error
        if stop > self._size:
            missing = stop - self._size
            raise self._corrupt(f"tensor {name}: {missing:,} of its bytes are cut off", name)
        if start < base or stop - start != prod(shape) * dtype.itemsize:
            raise self._corrupt(f"tensor {name}: {stop - start:,} bytes do not hold shape {shape}", name)
        return Entry(dtype, shape, start, stop)

    def _check_overlaps(self, entries: dict[str, Entry]) -> None:
        ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
        for (_, before), (name, after) in pairwise(ordered):
            if after.start < before.stop:
                raise self._corrupt(f"tensor {name}: it overlaps another tensor", name)

    def _corrupt(self, reason: str, tensor: str = "") -> CorruptFile:
        return CorruptFile(f"{self.path.name}: {reason}", file=str(self.path), tensor=tensor)


class TensorStore:
    """All tensors of a folder (or of one file), by their names on disk.

    `trust` is told of a file before any tensor of it is read, and raises where it is not to be believed.
    """

    def __init__(self, path: Path, trust: Callable[[Path], None] = lambda path: None) -> None:
        self.files = [SafetensorsFile(file) for file in weight_files(path)]
        self._trust = trust
        self._homes = {name: file for file in self.files for name in file.entries}

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def entry(self, name: str) -> Entry:
        return self._home(name).entries[name]

    def read(self, name: str) -> Tensor:
        home = self._home(name)
        self._trust(home.path)
        return home.read(name)

    def _home(self, name: str) -> SafetensorsFile:
        if name not in self._homes:
            raise MissingTensor(f"the checkpoint has no tensor {name}", tensor=name)
        return self._homes[name]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all of the folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the folder of a checkpoint", path=str(path))
    index = path / INDEX_NAME
    if not index.is_file():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{path} has no .safetensors file", path=str(path))
        return found
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptFile(f"{INDEX_NAME} is not a readable index: {error}", file=str(index)) from error
    for name in names:
        if Path(name).name != name:
            raise CorruptFile(f"{INDEX_NAME} names {name!r}, which is not a file beside it", file=str(index))
        if not (path / name).is_file():
            raise CheckpointError(f"{INDEX_NAME} names {name}, which is not there", file=name)
    return [path / name for name in names]
