"""From the engine's thread to readers on an event loop, with one wake-up for all that came since the last.

`call_soon_threadsafe` writes to a pipe each time. A step has an output for every running request, all of them
at once; waking the loop for each costs more than what it then does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


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


class Box(Generic[T]):
    """What has come for one reader. It is made and read on the loop's thread; `post` may come from any.

    A third of what `asyncio.Queue` does for each item: nothing is bounded, joined or read by several.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._mailbox = mailbox_of(self._loop)
        self._items: deque[T] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def post(self, item: T) -> None:
        self._mailbox.post(self._put, item)

    async def get(self) -> T:
        """The next item, in the order of posting."""
        while not self._items:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._items.popleft()

    def _put(self, item: T) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


def mailbox_of(loop: asyncio.AbstractEventLoop) -> Mailbox:
    """The one mailbox of a loop; call it on the loop's own thread."""
    if loop not in _mailboxes:
        _mailboxes[loop] = Mailbox(loop)
    return _mailboxes[loop]
