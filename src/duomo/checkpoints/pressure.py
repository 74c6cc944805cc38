"""Whether the machine is short of memory, as Linux tells it; elsewhere it never says so.

Two signs: little memory is available, or programs stand still waiting for it (pressure stall information, of
this control group where it has its own).
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

LEAST_AVAILABLE = 0.05  # of all memory
MOST_STALLED = 10.0  # per cent of the last ten seconds in which some program waited for memory
_PRESSURE = ("sys/fs/cgroup/memory.pressure", "proc/pressure/memory")


def available_bytes(root: Path = Path("/")) -> tuple[int, int] | None:
    """(available, all) memory of the machine; None where the system does not tell."""
    sizes = {}
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            sizes[name] = int(value.split()[0]) << 10
    try:
        return sizes["MemAvailable"], sizes["MemTotal"]
    except KeyError:
        return None


def stalled_percent(root: Path = Path("/")) -> float:
    """Share of the last ten seconds in which some program waited for memory; 0 where nobody tells."""
    for name in _PRESSURE:
        with suppress(OSError, ValueError, IndexError):
            for line in (root / name).read_text().splitlines():
                if line.startswith("some "):
                    return float(line.split()[1].removeprefix("avg10="))
    return 0.0


def is_short_of_memory(root: Path = Path("/")) -> bool:
    found = available_bytes(root)
    is_full = found is not None and found[0] < LEAST_AVAILABLE * found[1]
    return is_full or stalled_percent(root) > MOST_STALLED
