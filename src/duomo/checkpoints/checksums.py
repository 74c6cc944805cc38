"""SHA256SUMS of a checkpoint's folder, as `sha256sum` writes it: no file is believed before it was compared.

A weight file is compared just before its first tensor is read, from its first byte to its last. The tensors
then come from the pages that this brought in, so a file that fits the free memory is read from disk once;
comparing all of them first would read a checkpoint larger than memory twice. The price: damage in the last
file is found when the last layers are due. Small files are compared at once, what is not listed never.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from duomo.errors import CheckpointError, CorruptFile

SUMS_NAME = "SHA256SUMS"
WEIGHTS = ".safetensors"
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_CHUNK_BYTES = 1 << 20
_NOT_JUDGED = ".md"  # a card is corrected by hand and changes no answer


class Checksums:
    """What a folder's SHA256SUMS says; nothing where there is none. `digests` are by the file's name."""

    def __init__(self, folder: Path, digests: Mapping[str, str]) -> None:
        self.folder, self.digests = folder, digests
        self._compared: set[str] = set()

    @classmethod
    def of(cls, folder: Path) -> Checksums:
        """CorruptFile where a line is not a SHA-256 and a name."""
        path, digests = folder / SUMS_NAME, {}
        if not path.is_file():
            return cls(folder, {})
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), start=1):
            if not line.strip():
                continue
            match = _LINE.fullmatch(line)
            if not match:
                raise CorruptFile(f"{path}:{number} is not a SHA-256, two spaces and a file's name")
            digests[match[2]] = match[1].lower()
        return cls(folder, digests)

    def compare(self, path: Path) -> None:
        """Reads the file, once however often it is asked for. CorruptFile where it is not what is listed."""
        listed = self.digests.get(path.name)
        if listed is None or path.name in self._compared:
            return
        found = sha256_of(path)
        if found != listed:
            raise CorruptFile(
                f"{path} is damaged: its SHA-256 begins {found[:12]}, {SUMS_NAME} beside it says "
                f"{listed[:12]}; fetch the file again, or leave {SUMS_NAME} out if it was changed on purpose",
                file=str(path),
            )
        self._compared.add(path.name)

    def compare_small(self) -> None:
        """Everything listed but weights and documents; CheckpointError where a weight file is not there."""
        for name in self.digests:
            path = self.folder / name
            if name.endswith(WEIGHTS) and not path.is_file():
                raise CheckpointError(f"{SUMS_NAME} of {self.folder} names {name}, which is not there")
            if not name.endswith((WEIGHTS, _NOT_JUDGED)) and "/" not in name and path.is_file():
                self.compare(path)

    def compare_all(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self.compare(path)


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits; it is never in memory as a whole."""
    digest = sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
