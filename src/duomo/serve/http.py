"""uvicorn as this server runs it: HTTP/1.1 by httptools, with bounded heads and requests that must arrive.

A connection that sends half a request, or nothing, is closed after --request-timeout-s; what is no HTTP gets
the same envelope as every other error. httptools reads and writes in a few microseconds what h11 needs thirty
for, which counts once for every token of every stream; bounding the head is left to us.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from duomo.errors import ConfigError
from duomo.serve.options import Options
from duomo.serve.problems import Problem

_MAX_HEAD_BYTES = 64 << 10
_IDLE_S = 30  # between two requests of a connection
_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # IPv6 where it is switched off


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
        timeout_graceful_shutdown=2,
        timeout_keep_alive=_IDLE_S,
        lifespan="off",
    )


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on all addresses of `host`, not yet read from. ConfigError if one is taken."""
    try:
        return _bound(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE))
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise ConfigError(f"--host {host} --port {port} cannot be listened on: {said}") from error


def _bound(places: list[Any]) -> list[socket.socket]:
    bound: list[socket.socket] = []
    failure: OSError | None = None
    for family, kind, _, _, address in dict.fromkeys(places):
        if bound:  # a free port is the same one everywhere
            address = (address[0], bound[0].getsockname()[1], *address[2:])
        try:
            one = socket.socket(family, kind)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
            one.listen()  # two that only bind do not exclude each other
        except OSError as error:
            failure = error
            if error.errno not in _NO_SUCH_FAMILY:
                raise
        else:
            bound.append(one)
    if not bound and failure is not None:
        raise failure
    return bound


class _HeadTooLong(Exception):
    """Raised within the parser, which gives up on the request."""


class Protocol(HttpToolsProtocol):
    request_timeout_s = 60.0
    _late: asyncio.TimerHandle | None = None
    _is_arriving = True  # a request is awaited, or a part of it is here
    _in_head = True
    _has_begun = False  # with the bytes that are read now
    _head_bytes = 0  # of what the parser has told
    _untold_bytes = 0  # of a head of which it may have told nothing: one long line

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._has_begun = False
        self._unset_keepalive_if_required()
        self._feed(data)
        goes_on = self._in_head and not self._has_begun
        self._untold_bytes = self._untold_bytes + len(data) if goes_on else 0
        if self._untold_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _decline(self, rest: bytes) -> None:
        """An offer of HTTP/2, which Java's client makes with every request, or of WebSocket.

        The parser takes what follows such a head for the other protocol; for us it is the body. So a new one
        reads the head again, without the offer.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("")
            return
        lines = [method + b" " + self.url + b" HTTP/1.1"]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # ---- told by the parser ----

    def on_message_begin(self) -> None:
        self._is_arriving = self._in_head = self._has_begun = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._is_arriving = False
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        answer = Problem(
            400, "invalid_http", "this is no HTTP/1.1 request, or its head is too long"
        ).response()
        head: list[Any] = [*answer.raw_headers, (b"connection", b"close")]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in head)
        self.transport.write(STATUS_LINE[400] + lines + b"\r\n" + bytes(answer.body))
        self.transport.close()

    # ---- bounds ----

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > _MAX_HEAD_BYTES:
            raise _HeadTooLong

    def _watch(self) -> None:
        """The clock runs while a request is awaited or arriving, and stops once it is whole."""
        if not self._is_arriving:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.request_timeout_s, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
