"""A backend whose every token is the moment it was made, in nanoseconds: it measures the server around it.

Like the engine it has a thread of its own that makes one token for every running request at each step, all at
once, and hands them to the event loop. The first token also says when the request arrived. Times are of
CLOCK_MONOTONIC, which every process of a machine shares; `duomo.bench.overhead` reads them at the other end.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

from duomo.engine.mailbox import Box
from duomo.engine.request import Usage
from duomo.serve.backend import Job, Piece
from duomo.serve.scripted import Scripted


class Clock(Scripted):
    """A step every `step_s`; a request runs for its max_tokens."""

    def __init__(self, step_s: float = 0.02, max_model_len: int = 4096) -> None:
        super().__init__(max_model_len=max_model_len)
        self._step_s, self._loop = step_s, asyncio.get_running_loop()
        self._arrivals: dict[str, Box[int]] = {}  # the way of the real engine's outputs
        threading.Thread(target=self._beat, name="duomo-clock", daemon=True).start()

    def _beat(self) -> None:
        while not self._loop.is_closed() and self.is_alive:
            time.sleep(self._step_s)
            now = time.monotonic_ns()
            for box in list(self._arrivals.values()):
                box.post(now)

    async def _speak(self, job: Job) -> AsyncIterator[Piece]:
        count, arrived = self._count(job), time.monotonic_ns()
        box = self._arrivals[job.id] = Box()
        self._hurried[job.id] = False
        most = job.params.max_tokens or 16
        try:
            for made in range(1, most + 1):
                now = await box.get()
                text = f"{arrived} {now} " if made == 1 else f"{now} "
                yield Piece(text=text, token_ids=(made,), usage=Usage(count.prompt_tokens, made))
            yield Piece(finish_reason="length", usage=Usage(count.prompt_tokens, most), thinking="off")
        finally:
            del self._arrivals[job.id]
            self._hurried.pop(job.id, None)
            self._cancelled.discard(job.id)
