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
    waiting: dict[int, asyncio.Queue[int]] = {}

    def beat() -> None:
        while True:
            time.sleep(step_s)
            now = time.monotonic_ns()
            for queue in list(waiting.values()):
                loop.call_soon_threadsafe(queue.put_nowait, now)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            asked = json.loads(await reader.readexactly(length))
            arrived = time.monotonic_ns()
            queue = waiting[id(writer)] = asyncio.Queue()
            for made in range(asked["max_tokens"]):
                now = await queue.get()
                body = (_EVENT % (f"{arrived} {now}" if made == 0 else f"{now}")).encode()
                writer.write(_HEAD + body if made == 0 else body)
        except (asyncio.IncompleteReadError, ConnectionError):  # somebody who only looked whether we are here
            pass
        finally:
            waiting.pop(id(writer), None)
            writer.close()

    threading.Thread(target=beat, daemon=True).start()
    async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
