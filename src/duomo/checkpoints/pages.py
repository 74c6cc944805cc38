"""Pages of mapped weights: which are in memory, and advice to the system about them.

Wraps madvise, posix_fadvise, mincore and /proc/self/pagemap for ranges of addresses. Advice is only ever
advice: where the system has none of these calls, nothing happens and counts are None. Ranges given up are
cut inward to whole pages, so a neighbour sharing a page keeps it. Only pages that lie in a file are ever
given up: memory without one (a copy on huge pages, say) would come back as zeros.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

PAGE = mmap.PAGESIZE
RANDOM, WILLNEED, DONTNEED, COLD, POPULATE_READ = 1, 3, 4, 20, 22  # Linux
_IS_LINUX = sys.platform.startswith("linux")
_PRESENT = np.uint64(1 << 63)  # of an entry of /proc/self/pagemap


@dataclass(frozen=True, slots=True)
class Range:
    """`num_bytes` of mapped memory from `address`; `owner` keeps it mapped, so nobody else can move in."""

    address: int
    num_bytes: int
    owner: object = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, array: npt.NDArray[np.generic]) -> Range:
        assert array.flags.c_contiguous, "a range is one piece of memory"
        return cls(int(array.ctypes.data), array.nbytes, array)

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


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/self/maps that belongs to a file."""

    start: int
    stop: int
    offset: int
    path: str


def file_mappings() -> list[Mapping]:
    """Of this process, in order of address; empty where the system does not tell.

    Those that may be written are left out: their pages may hold what no file does, and would lose it.
    """
    found = []
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[4] != "0" and "w" not in fields[1]:  # an inode: it lies in a file
                start, stop = (int(part, 16) for part in fields[0].split("-"))
                found.append(Mapping(start, stop, int(fields[2], 16), fields[5]))
    return found


def whole_files(ranges: Iterable[Range]) -> list[Range]:
    """The mappings of the files that the ranges lie in, each once and whole."""
    paths = {path for _, _, path, _ in _in_files(ranges, None)}
    return [Range(each.start, each.stop - each.start) for each in file_mappings() if each.path in paths]


def library_code() -> list[Range]:
    """The machine code of shared libraries that lies in memory as it lies in its file.

    Loading runs much of it once. A mapping of which a page was written is left out: that page has no file.
    """
    found: list[Range] = []
    start = stop = 0
    with suppress(OSError), open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(maxsplit=5)
            if not fields[0].endswith(":"):  # the first line of a mapping
                start, stop = (int(part, 16) for part in fields[0].split("-"))
                if fields[1] != "r-xp" or fields[4] == "0" or len(fields) < 6:
                    start = stop
            elif fields[0] == "Anonymous:" and start < stop and fields[1] == "0":
                found.append(Range(start, stop - start))
    return found


def ask_for(ranges: Iterable[Range]) -> None:
    """Starts reading the ranges from disk; returns at once."""
    _advise((item.outer for item in ranges), WILLNEED)


def bring_in(ranges: Iterable[Range]) -> None:
    """Reads the ranges and maps them; returns when they are in memory."""
    pieces = [item.outer for item in ranges]
    _advise(pieces, WILLNEED)  # everything is asked for before anything is waited for
    for start, length in pieces:
        if not _advise([(start, length)], POPULATE_READ):  # Linux before 5.14, other systems: touch each page
            touched = (ctypes.c_ubyte * length).from_address(start)
            np.asarray(touched)[::PAGE].max()


def expect_single_reads(ranges: Iterable[Range]) -> None:
    """A fault in the ranges shall bring in its own page and not its neighbours."""
    _advise((item.outer for item in ranges), RANDOM)


def let_go(ranges: Iterable[Range], mappings: list[Mapping] | None = None) -> None:
    """Takes the ranges out of this process; their pages are the first to be reused. Reading maps them again.

    Neighbours are joined, so that a page shared by two of the ranges goes too. `mappings` spares a look at
    `file_mappings` to who lets go often.
    """
    pieces = [(start, length) for start, length, _, _ in _in_files(ranges, mappings)]
    _advise(pieces, COLD)
    _advise(pieces, DONTNEED)


def drop(ranges: Iterable[Range], mappings: list[Mapping] | None = None) -> None:
    """`let_go`, and out of the system's file cache too, unless another process maps them."""
    pieces = list(_in_files(ranges, mappings))
    _advise([(start, length) for start, length, _, _ in pieces], DONTNEED)
    if hasattr(os, "posix_fadvise"):
        for _, length, path, offset in pieces:
            with suppress(OSError):
                os.posix_fadvise(_descriptor(path), offset, length, os.POSIX_FADV_DONTNEED)


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


def _in_files(ranges: Iterable[Range], mappings: list[Mapping] | None) -> Iterator[tuple[int, int, str, int]]:
    """(start, length, path, offset in the file) of the whole pages of the ranges that lie in a file."""
    mappings = file_mappings() if mappings is None else mappings
    starts = [mapping.start for mapping in mappings]
    for item in joined(ranges):
        start, length = item.inner
        stop, index = start + length, bisect_right(starts, start) - 1
        for mapping in mappings[max(0, index) :]:
            low, high = max(start, mapping.start), min(stop, mapping.stop)
            if mapping.start >= stop:
                break
            if low < high:
                yield low, high - low, mapping.path, mapping.offset + low - mapping.start


@cache
def _descriptor(path: str) -> int:
    """Stays open: a handful of files, and a capped model drops pieces of them all the time."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _advise(pieces: Iterable[tuple[int, int]], advice: int) -> bool:
    """Whether the system took all of it; refusal changes nothing."""
    libc, is_taken = _libc(), True
    for start, length in pieces:
        if libc is not None and length:
            is_taken &= libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0
    return is_taken and libc is not None


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None, use_errno=True) if _IS_LINUX else None
