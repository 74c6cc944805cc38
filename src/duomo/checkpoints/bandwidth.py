"""How fast this machine reads: memory with all threads, and the disk a checkpoint lies on.

Measured now, in about a second, since a bound computed from a data sheet bounds nothing. Whatever else
runs at the time makes the figures lower.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

MEMORY_BYTES = 512 << 20  # far beyond any cache
DISK_BYTES = 256 << 20
_CHUNK_BYTES = 4 << 20


def memory_bytes_per_s(num_bytes: int = MEMORY_BYTES, repeats: int = 3) -> float:
    """The best of a few plain sums over a buffer, by torch's threads."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def gpu_bytes_per_s(num_bytes: int = MEMORY_BYTES) -> float | None:
    """Of the first GPU, by sums over a buffer; None where there is none."""
    if not torch.cuda.is_available():
        return None
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device="cuda")
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        buffer.sum()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def disk_bytes_per_s(path: Path, num_bytes: int = DISK_BYTES) -> float:
    """Reads the head of a file in order, after asking the system to forget it (which it may refuse)."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, num_bytes, os.POSIX_FADV_DONTNEED)
        start, total = time.perf_counter(), 0
        while total < num_bytes and (chunk := file.read(_CHUNK_BYTES)):
            total += len(chunk)
        return total / max(time.perf_counter() - start, 1e-9)
