"""Features of pictures and videos by content hash: in memory, and in a folder if one is given.

A second question about a picture so does no vision work, even after a restart. What the disk refuses (full,
read-only) is only not cached. A file that is damaged or of another model is encoded again.
"""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class FeatureCache:
    """`fingerprint` names the weights, so that two models never share a folder's files."""

    def __init__(self, max_bytes: int = 256 << 20, folder: Path | None = None, fingerprint: str = "") -> None:
        self.max_bytes = max_bytes
        self.folder = folder / (fingerprint or "model") if folder else None
        self.num_encoded = self.num_hits = 0
        self.num_bytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes, encode: Callable[[], Tensor]) -> Tensor:
        """The features [R, D] of a medium; `encode` runs only where they are nowhere to be found."""
        found = self._kept.get(key)
        if found is None:
            found = self._load(key)
        if found is not None:
            self.num_hits += 1
        else:
            found = encode()
            self.num_encoded += 1
            self._save(key, found)
        self._keep(key, found)
        return found

    def clear(self) -> None:
        """Forgets what is in memory; files stay."""
        self._kept.clear()
        self.num_bytes = 0

    def _keep(self, key: bytes, features: Tensor) -> None:
        if key not in self._kept:
            self.num_bytes += features.numel() * features.element_size()
        self._kept[key] = features
        self._kept.move_to_end(key)
        while self.num_bytes > self.max_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.numel() * dropped.element_size()

    def _path(self, key: bytes) -> Path | None:
        return self.folder / f"{key.hex()}.safetensors" if self.folder else None

    def _load(self, key: bytes) -> Tensor | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            return load_file(path)["features"]
        except (OSError, SafetensorError, KeyError):
            return None

    def _save(self, key: bytes, features: Tensor) -> None:
        path = self._path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(handle)
            try:
                save_file({"features": features.contiguous()}, name)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except (OSError, SafetensorError):  # a full disk costs the cache alone
            return
