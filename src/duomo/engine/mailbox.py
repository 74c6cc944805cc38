"""From the engine's thread to an event loop, with one wake-up for all that came since the last.

`call_soon_threadsafe` writes to a pipe each time. A step has an output for every running request, all of them
at once; waking the loop for each costs more than what it then does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary


class Mailbox:
    """Of one loop. `post` may come from any thread; deliveries are in its order, on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_due = False

    def post(self, deliver: Callable[[Any], None], letter: Any) -> None:
        """`deliver(letter)` on the loop, soon. A loop that is closed takes nothing any more."""
        self._letters.append((deliver, letter))
        if not self._is_due and not self._loop.is_closed():
            self._is_due = True
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._is_due = False  # first: what is posted from here on brings a delivery of its own
        while self._letters:
            deliver, letter = self._letters.popleft()
            deliver(letter)


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


def mailbox_of(loop: asyncio.AbstractEventLoop) -> Mailbox:
    """The one mailbox of a loop; call it on the loop's own thread."""
    if loop not in _mailboxes:
        _mailboxes[loop] = Mailbox(loop)
    return _mailboxes[loop]
