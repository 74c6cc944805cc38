"""The least a streaming server can do, to compare with: no checks, no metrics; the same bytes and beats.

`python -m duomo.bench.bare PORT STEP_S` reads each request to its end and writes prepared events, one for
each stream at each step, with the time of the step in them. What a server takes beyond this is its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time

_EVENT = (
    'data: {"id":"chatcmpl-00000000000000000000000000000000","created":1700000000,"model":"duomo","choices":'
    '[{"index":0,"delta":{"content":"%s "},"finish_reason":null,"logprobs":null}],'
    '"object":"chat.completion.chunk"}\n\n'
)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n"


async def serve(port: int, step_s: float) -> None:
    loop = asyncio.get_running_loop()
    answering: set[_Answer] = set()

    def tell(now: int) -> None:
        for answer in list(answering):
            answer.tell(now)
            if answer.is_over:
                answering.discard(answer)

    def beat() -> None:
        while True:
            time.sleep(step_s)
            loop.call_soon_threadsafe(tell, time.monotonic_ns())

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            asked = json.loads(await reader.readexactly(length))
            answering.add(_Answer(writer, asked["max_tokens"], time.monotonic_ns()))
        except (asyncio.IncompleteReadError, ConnectionError):  # somebody who only looked whether we are here
            writer.close()

    threading.Thread(target=beat, daemon=True).start()
    async with await asyncio.start_server(begin, "127.0.0.1", port) as server:
        await server.serve_forever()


class _Answer:
    """Written by the beat itself: no queue, no task."""

    def __init__(self, writer: asyncio.StreamWriter, num_left: int, arrived: int) -> None:
        self._writer, self._num_left = writer, num_left
        self._arrived: int | None = arrived

    @property
    def is_over(self) -> bool:
        return self._num_left == 0

    def tell(self, now: int) -> None:
        first, self._arrived = self._arrived, None
        if first is None:
            self._writer.write((_EVENT % f"{now}").encode())
        else:
            self._writer.write(_HEAD + (_EVENT % f"{first} {now}").encode())
        self._num_left -= 1
        if self.is_over:
            self._writer.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
