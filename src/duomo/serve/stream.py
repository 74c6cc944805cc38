"""Server-sent events with manners, and waiting for an answer while watching the client.

A silent stream gets a comment every few seconds; a reader that stands still or goes away ends the work behind
it at once; an error after the start is one `data: {"error": ...}` and then the proper end. No task is made
per token: the watcher and the disconnect listener run beside the pump for the whole stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from duomo.serve.problems import problem_of

T = TypeVar("T")
log = logging.getLogger("duomo.serve")

DONE = b"data: [DONE]\n\n"
_COMMENT = b": still working\n\n"


def event(value: Any, name: str = "") -> bytes:
    """One event; `name` is for Anthropic's and Responses' named events."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


def error_event(error: BaseException) -> bytes:
    return event(problem_of(error).envelope())


class EventStream(Response):
    """Sends what `events` yields as it comes. `source` feeds them; closing it at the end cancels the work."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        source: AsyncIterator[Any],
        *,
        headers: dict[str, str],
        keep_alive_s: float,
        slow_client_s: float,
        end: bytes = DONE,
        fail: Callable[[BaseException], bytes] = error_event,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events, self._source, self._end, self._fail = events, source, end, fail
        self._keep_alive_s, self._slow_client_s = keep_alive_s, slow_client_s
        self._sending_since: float | None = None
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        send = scope.get("duomo.send", send)
        tasks = [
            asyncio.ensure_future(job) for job in (self._pump(send), self._watch(send), disconnected(receive))
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        self._sending_since = self._last = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._sending_since = None

    async def _pump(self, send: Send) -> None:
        try:
            try:
                async for piece in self._events:
                    await self._send(send, piece)
            except OSError:  # the client is gone
                return
            except Exception as error:
                if problem_of(error).status >= 500:
                    log.warning("a stream failed: %s", problem_of(error).message, exc_info=_foreign(error))
                await self._send(send, self._fail(error))
            await self._send(send, self._end, more=False)
        finally:
            await closed(self._events)
            await closed(self._source)

    async def _watch(self, send: Send) -> None:
        """Comments on a silent stream; returns, which ends it, when the reader stands still too long."""
        step = min(self._keep_alive_s, self._slow_client_s) / 2
        while True:
            await asyncio.sleep(step)
            now = time.monotonic()
            if self._sending_since is not None:
                if now - self._sending_since > self._slow_client_s:
                    return
            elif now - self._last >= self._keep_alive_s:
                await self._send(send, _COMMENT)


def _foreign(error: BaseException) -> bool:
    return problem_of(error).code == "internal_error"


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None with the work cancelled when the client leaves before it is done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        gone.cancel()
        task.cancel()
        with suppress(BaseException):
            await asyncio.gather(gone, task, return_exceptions=True)


async def first_or_late(items: AsyncIterator[T], patience_s: float) -> AsyncIterator[T]:
    """The same items; errors before the first one, within the patience, are raised at once.

    So a bad prompt is answered with its own status, and a long prefill still becomes a stream in time.
    """
    first: asyncio.Task[T] = asyncio.ensure_future(_anext(items))
    done, _ = await asyncio.wait([first], timeout=patience_s)
    if done and not isinstance(first.exception(), _Empty):
        first.result()
    return _Chained(first, items)


async def _anext(items: AsyncIterator[T]) -> T:
    awaitable: Awaitable[T] = items.__anext__()
    try:
        return await awaitable
    except StopAsyncIteration as error:  # may not leave a task
        raise _Empty from error


class _Empty(Exception):
    pass


class _Chained(AsyncIterator[T]):
    """The task's item, then `items` as they are: no frame of ours stands between them and their reader."""

    def __init__(self, first: asyncio.Task[T], items: AsyncIterator[T]) -> None:
        self._first, self._items, self._is_begun = first, items, False

    def __anext__(self) -> Awaitable[T]:
        if self._is_begun:
            return self._items.__anext__()
        self._is_begun = True
        return self._begin()

    async def _begin(self) -> T:
        try:
            return await self._first
        except _Empty:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        self._first.cancel()
        with suppress(BaseException):
            await self._first
        await closed(self._items)


async def closed(items: AsyncIterator[Any]) -> None:
    """Closes a generator, which runs its `finally`; other iterators have nothing to close."""
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()
