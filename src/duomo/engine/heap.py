"""What a busy process was lent goes back to the system once it is quiet.

glibc keeps what is freed, in up to eight arenas a core, one for each thread that once met another's lock: a
server whose threads read long prompts held two hundred megabytes of nothing after three minutes. So there are
two arenas here, and after a while without work the garbage collector runs and every free page is given back.
Other C libraries have neither call and are left alone.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable

from duomo.checkpoints.pages import let_go, library_code

QUIET_S = 2.0
_M_ARENA_MAX, _NUM_ARENAS = -8, 2
_M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2 << 20


class Heap:
    """Of this process; one is enough. `clock` and `give_back` are for tests."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, give_back: Callable[[], None] | None = None
    ) -> None:
        self._clock, self._give_back = clock, give_back or give_back_free_pages
        self._last_used: float | None = None

    def settle(self) -> None:
        """After loading: what there is now stays, so the collector need not look at it again."""
        gc.collect()
        gc.freeze()
        self.used()

    def used(self) -> None:
        """Work was done now."""
        self._last_used = self._clock()

    def tidy(self) -> bool:
        """Gives back what is free, once after each time of work; takes 5 to 50 ms. False: not now."""
        if self._last_used is None or self._clock() - self._last_used < QUIET_S:
            return False
        self._last_used = None
        self._give_back()
        return True


def few_arenas() -> None:
    """Before threads are started; those there are keep theirs."""
    _set_glibc(_M_ARENA_MAX, _NUM_ARENAS)


def return_large_pieces() -> None:
    """From now on what is large goes back to the system the moment it is freed.

    glibc does so of itself only until the first large piece is freed: then it keeps pieces of that size.
    """
    _set_glibc(_M_MMAP_THRESHOLD, LARGE_BYTES)


def _set_glibc(parameter: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):  # glibc alone has both
        libc.mallopt(parameter, value)


def give_back_unused() -> None:
    """After loading, or pictures: free pages, and code of libraries, which is read again where it is run.

    Half of what torch's libraries hold after loading is never run again.
    """
    give_back_free_pages()
    let_go(library_code())


def give_back_free_pages() -> None:
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
