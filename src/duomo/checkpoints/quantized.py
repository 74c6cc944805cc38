"""Quantized weights on disk: safetensors files that describe and check themselves. FORMAT.md is the contract.

Owns names, metadata, version and checksums; refuses a flipped byte, a cut file, an unknown version, each with
the tensor's name. It parses the safetensors header itself, so that a cut file is told by the tensor it cuts.
Worth knowing: every file is complete alone (codes and all), since quantizing writes one file a layer.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from duomo.errors import CorruptFile, Error, MissingTensor
from duomo.trellis.code import TrellisCode
from duomo.trellis.integer import IntTensor
from duomo.trellis.tensor import TrellisBank, TrellisTensor

FORMAT, VERSION = "duomo-quantized", 1
Stored: TypeAlias = "TrellisTensor | TrellisBank | IntTensor | torch.Tensor"
_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CODE_FIELDS = ("bits", "window", "columns", "codebook", "unit")


@dataclass(frozen=True)
class _Slice:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class QuantizedFile:
    """One file, memory-mapped. Headers are checked on opening, a tensor's bytes when it is read.

    `verify` False leaves codes and scales unread (plain tensors are checked all the same): a checksum would
    touch every page of weights that may never be needed.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        self.path = Path(path)
        self.verify = verify
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, self._start = _read_header(file.read(8), file, size, self.path)
            self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            metadata = header.pop("__metadata__", {})
            self._slices = {name: _slice(fields) for name, fields in header.items()}
            _check_metadata(metadata, self.path)
            self._entries: dict[str, dict[str, Any]] = json.loads(metadata["entries"])
            self._codes = {
                name: TrellisCode(name, **_code_fields(fields))
                for name, fields in json.loads(metadata["codes"]).items()
            }
            stored = {key for name, entry in self._entries.items() for key in _keys(name, entry)}
        except CorruptFile:
            raise
        except (Error, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{self.path}: its header cannot be read: {error}") from error
        for name in sorted(stored ^ set(self._slices)):
            raise CorruptFile(f"{self.path}: {name} is listed or stored, but not both", tensor=name)
        for name, part in self._slices.items():
            if self._start + part.end > size:
                raise CorruptFile(
                    f"{self.path}: {name} is cut short: the file has {size} bytes, "
                    f"{self._start + part.end} are needed",
                    tensor=name,
                )

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def num_bytes(self, name: str) -> int:
        """Bytes on disk, scales included."""
        return sum(self._slices[key].end - self._slices[key].begin for key in _keys(name, self._entry(name)))

    def read(self, name: str, borrows: bool = False) -> Stored:
        """The tensor as it is stored, in the file's own memory (read-only). CorruptFile, MissingTensor.

        A plain one is a copy that may be written to, unless `borrows`.
        """
        entry = self._entry(name)
        try:
            return self._build(name, entry, borrows)
        except CorruptFile:
            raise
        except (Error, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptFile(f"{self.path}: {name}: {error}", tensor=name) from error

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._entries:
            raise MissingTensor(f"{self.path}: no tensor {name!r}", tensor=name)
        return self._entries[name]

    def _build(self, name: str, entry: dict[str, Any], borrows: bool) -> Stored:
        kind, shape = entry["kind"], tuple(int(n) for n in entry["shape"])
        if kind == "plain":
            part = self._slices[name]
            if part.shape != shape:
                raise ValueError(f"stored as {part.shape}, listed as {shape}")
            data = np.frombuffer(self._checked(name, name, entry), np.uint8)
            return torch.from_numpy(data if borrows else data.copy()).view(_DTYPES[part.dtype]).reshape(shape)
        scale = self._array(name, "row_scale", entry, np.float16).reshape(shape[:-1])
        if kind == "int":
            return self._integers(name, entry, shape, scale)
        if kind != "trellis":
            raise ValueError(f"a tensor of kind {kind!r}; this version knows plain, int and trellis")
        code, seed, chain = self._codes[entry["code"]], entry["seed"], int(entry["chain"])
        codes = self._array(name, "codes", entry, np.uint8)
        if len(shape) == 2:
            return TrellisTensor(code, codes.reshape(-1), scale, (shape[0], shape[1]), seed, chain)
        codes = codes.reshape(shape[0], -1)
        return TrellisBank(code, codes, scale, (shape[0], shape[1], shape[2]), seed, chain)

    def _integers(self, name: str, entry: dict[str, Any], shape: tuple[int, ...], scale: Any) -> IntTensor:
        bits = int(entry["bits"])
        codes = self._array(name, "codes", entry, np.uint8 if bits == 6 else np.int8)
        tensor = IntTensor(codes.reshape(*shape[:-1], shape[-1] * bits // 8), scale, bits, entry["seed"])
        if tensor.shape != shape:
            raise ValueError(f"codes of {tensor.shape}, listed as {shape}")
        return tensor

    def _array(self, name: str, part: str, entry: dict[str, Any], dtype: Any) -> Any:
        key = f"{name}.{part}"
        expected = _NAMES[torch.from_numpy(np.empty(0, dtype)).dtype]
        if self._slices[key].dtype != expected:
            raise ValueError(f"{key} is {self._slices[key].dtype}, not {expected}")
        return np.frombuffer(self._checked(name, key, entry), dtype)

    def _checked(self, name: str, key: str, entry: dict[str, Any]) -> memoryview:
        part = self._slices[key]
        data = self._bytes[self._start + part.begin : self._start + part.end]
        if (self.verify or key == name) and zlib.crc32(data) != entry["crc32"][
            key.removeprefix(name).removeprefix(".")
        ]:
            raise CorruptFile(f"{self.path}: the bytes of {key} do not match their checksum", tensor=name)
        return data


def write_quantized(path: str | os.PathLike[str], tensors: Mapping[str, Stored]) -> int:
    """Writes one file, whole or not at all (a temporary name, then a rename). Returns its size in bytes."""
    parts: dict[str, torch.Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    codes: dict[str, TrellisCode] = {}
    for name, tensor in tensors.items():
        own, entries[name] = _disassemble(tensor)
        entries[name]["crc32"] = {key: zlib.crc32(_raw(part)) for key, part in own.items()}
        parts |= {f"{name}.{key}" if key else name: part for key, part in own.items()}
        if isinstance(tensor, (TrellisTensor, TrellisBank)):
            codes[tensor.code.name] = tensor.code
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "entries": json.dumps(entries, sort_keys=True),
        "codes": json.dumps(
            {name: {field: getattr(code, field) for field in _CODE_FIELDS} for name, code in codes.items()},
            sort_keys=True,
        ),
    }
    metadata["crc32"] = str(_metadata_crc(metadata))
    return _write(Path(path), parts, metadata)


def open_quantized(folder: str | os.PathLike[str], verify: bool = True) -> dict[str, QuantizedFile]:
    """Every tensor of a quantized checkpoint folder, and the file that holds it."""
    homes: dict[str, QuantizedFile] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        file = QuantizedFile(path, verify)
        for name in file.names():
            if name in homes:
                raise CorruptFile(f"{name} is in both {homes[name].path.name} and {path.name}", tensor=name)
            homes[name] = file
    return homes


def read_quantized(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Stored]]:
    """(name, tensor) of everything in a folder, one at a time."""
    for name, file in open_quantized(folder).items():
        yield name, file.read(name)


def dequantize(stored: Stored) -> torch.Tensor:
    """float32 in the original basis; a plain tensor as it is."""
    return stored if isinstance(stored, torch.Tensor) else torch.from_numpy(stored.decode())


def _disassemble(tensor: Stored) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    if isinstance(tensor, torch.Tensor):
        return {"": tensor.detach().contiguous().cpu()}, {"kind": "plain", "shape": list(tensor.shape)}
    scale = torch.from_numpy(np.ascontiguousarray(tensor.row_scale))
    if isinstance(tensor, IntTensor):
        entry = {"kind": "int", "bits": tensor.bits, "shape": list(tensor.shape), "seed": tensor.seed}
        return {"codes": torch.from_numpy(np.ascontiguousarray(tensor.codes)), "row_scale": scale}, entry
    entry = {
        "kind": "trellis",
        "code": tensor.code.name,
        "shape": list(tensor.shape),
        "seed": tensor.seed,
        "chain": tensor.chain,
    }
    return {"codes": torch.from_numpy(np.ascontiguousarray(tensor.codes)), "row_scale": scale}, entry


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _keys(name: str, entry: dict[str, Any]) -> list[str]:
    return [f"{name}.{part}" if part else name for part in entry["crc32"]]


def _metadata_crc(metadata: Mapping[str, str]) -> int:
    return zlib.crc32((metadata["version"] + metadata["entries"] + metadata["codes"]).encode())


def _code_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(fields[key]) if key in ("columns", "codebook") else fields[key] for key in _CODE_FIELDS
    }


def _check_metadata(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise CorruptFile(f"{path}: not a {FORMAT} file: format is {metadata.get('format')!r}")
    if metadata.get("version") != str(VERSION):
        raise CorruptFile(f"{path}: format version {metadata.get('version')}; this duomo reads {VERSION}")
    if str(_metadata_crc(metadata)) != metadata.get("crc32"):
        raise CorruptFile(f"{path}: the header does not match its checksum")


def _slice(fields: dict[str, Any]) -> _Slice:
    (begin, end), shape = fields["data_offsets"], tuple(int(n) for n in fields["shape"])
    wanted = _DTYPES[fields["dtype"]].itemsize
    for size in shape:
        wanted *= size
    if begin < 0 or end - begin != wanted:
        raise ValueError(f"{end - begin} bytes for {fields['dtype']} of {shape}")
    return _Slice(fields["dtype"], shape, begin, end)


def _read_header(prefix: bytes, file: Any, size: int, path: Path) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + length > size:
        raise CorruptFile(f"{path}: cut short or not safetensors: the header does not end within the file")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise CorruptFile(f"{path}: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptFile(f"{path}: its header is not a JSON object")
    return header, 8 + length


def _write(path: Path, parts: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    # Wide types first, as safetensors does: every tensor then starts at a multiple of its own size.
    ordered = sorted(parts.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, part in ordered:
        end = offset + part.numel() * part.element_size()
        header[name] = {
            "dtype": _NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, part in ordered:
            file.write(_raw(part))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return 8 + len(text) + offset
