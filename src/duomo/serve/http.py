"""uvicorn as this server runs it: HTTP/1.1 by h11, whose heads are bounded, and requests that must arrive.

A connection that sends half a request, or nothing, is closed after --request-timeout-s; what is no HTTP gets
the same envelope as every other error.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from duomo.serve.options import Options
from duomo.serve.problems import Problem

_MAX_HEAD_BYTES = 64 << 10
_IDLE_S = 30  # between two requests of a connection


def http_config(app: ASGIApp, options: Options) -> uvicorn.Config:
    protocol = type("Protocol", (Protocol,), {"request_timeout_s": options.request_timeout_s})
    return uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=_IDLE_S,
        lifespan="off",
    )


class Protocol(H11Protocol):
    request_timeout_s = 60.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        answer = Problem(
            400, "invalid_http", "this is no HTTP/1.1 request, or its head is too long"
        ).response()
        headers: list[tuple[bytes, bytes]] = [*answer.raw_headers, (b"connection", b"close")]
        events: list[Any] = [
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """The clock runs while a request is awaited or arriving, and stops once it is whole."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.request_timeout_s, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
