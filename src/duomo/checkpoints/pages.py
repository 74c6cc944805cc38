"""Pages of memory-mapped weights: which are in memory, and advice to the system about them.

Wraps madvise, mincore and /proc/self/pagemap for ranges of addresses. Advice is only ever advice: where the
system has none of these calls, nothing happens and counts are None. Ranges given up are cut inward to whole
pages, so a neighbour sharing a page keeps it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
WILLNEED, DONTNEED, COLD = 3, 4, 20  # Linux
_IS_LINUX = sys.platform.startswith("linux")
_PRESENT = np.uint64(1 << 63)  # of an entry of /proc/self/pagemap


@dataclass(frozen=True, slots=True)
class Range:
    """`num_bytes` of mapped memory from `address`."""

    address: int
    num_bytes: int

    @classmethod
    def of(cls, array: npt.NDArray[np.generic]) -> Range:
        assert array.flags.c_contiguous, "a range is one piece of memory"
        return cls(int(array.ctypes.data), array.nbytes)

    @property
    def outer(self) -> tuple[int, int]:
        """(start, length) of all pages touched."""
        start = self.address // PAGE * PAGE
        return start, -(-(self.address + self.num_bytes - start) // PAGE) * PAGE

    @property
    def inner(self) -> tuple[int, int]:
        """(start, length) of the pages that belong to it alone; length 0 where there is none."""
        start = -(-self.address // PAGE) * PAGE
        return start, max(0, (self.address + self.num_bytes) // PAGE * PAGE - start)


def ask_for(ranges: Iterable[Range]) -> None:
    """Starts reading the ranges from disk; returns at once."""
    _advise((item.outer for item in ranges), WILLNEED)


def let_go(ranges: Iterable[Range]) -> None:
    """Takes the ranges out of this process; their pages are the first to be reused. Reading maps them again.

    Neighbours are joined, so that a page shared by two of the ranges goes too.
    """
    pieces = [item.inner for item in joined(ranges)]
    _advise(pieces, COLD)
    _advise(pieces, DONTNEED)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same memory in as few ranges as there can be; small gaps (padding of a file) are kept apart."""
    merged: list[Range] = []
    for item in sorted(ranges, key=lambda item: item.address):
        if merged and item.address <= merged[-1].address + merged[-1].num_bytes:
            stop = max(merged[-1].address + merged[-1].num_bytes, item.address + item.num_bytes)
            merged[-1] = Range(merged[-1].address, stop - merged[-1].address)
        else:
            merged.append(item)
    return merged


def mapped_bytes(ranges: Iterable[Range]) -> int | None:
    """Bytes of whole pages that this process holds, as in its resident size."""
    if not _IS_LINUX:
        return None
    total = 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            for item in ranges:
                start, length = item.inner
                file.seek(start // PAGE * 8)
                entries = np.frombuffer(file.read(length // PAGE * 8), np.uint64)
                total += int(np.count_nonzero(entries & _PRESENT)) * PAGE
    except OSError:
        return None
    return total


def cached_bytes(ranges: Iterable[Range]) -> int | None:
    """Bytes of whole pages in the system's file cache, whoever read them (mincore)."""
    libc = _libc()
    if libc is None:
        return None
    total = 0
    for item in ranges:
        start, length = item.inner
        pages = np.zeros(length // PAGE, np.uint8)
        if length and libc.mincore(
            ctypes.c_void_p(start), ctypes.c_size_t(length), pages.ctypes.data_as(_BYTES)
        ):
            return None
        total += int(np.count_nonzero(pages & 1)) * PAGE
    return total


_BYTES = ctypes.POINTER(ctypes.c_ubyte)


def _advise(pieces: Iterable[tuple[int, int]], advice: int) -> None:
    libc = _libc()
    for start, length in pieces:
        if libc is not None and length:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)  # refusal changes nothing


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if _IS_LINUX else None
