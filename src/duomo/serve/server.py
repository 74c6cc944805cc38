"""The state one server shares between its endpoints, and the way of every request through it.

States: loading, ready, draining, failed; `/health` says which. A request is checked (state, caller, key,
model name), decoded, let through the gate and then run; `answers` turns whatever goes wrong into an envelope.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from duomo.engine.heap import Heap
from duomo.errors import Aborted
from duomo.processing.media import FetchRules
from duomo.serve.backend import Backend, Job, Piece
from duomo.serve.convert import MediaRules
from duomo.serve.decode import decode, ignored_header
from duomo.serve.limits import Gate, Keys, check_caller, read_body
from duomo.serve.metrics import Metrics
from duomo.serve.options import Options
from duomo.serve.problems import Problem, invalid, problem_of
from duomo.serve.schema import Generation, MediaKwargs

T = TypeVar("T", bound=msgspec.Struct)
State = Literal["loading", "ready", "draining", "failed"]
log = logging.getLogger("duomo.serve")


@dataclass
class Server:
    """One backend behind HTTP. `backend` is None until it is loaded."""

    options: Options
    backend: Backend | None = None
    state: State = "loading"
    failure: str = ""
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.gate = Gate(self.options.max_concurrency)
        self.keys = Keys(self.options)
        self.metrics = Metrics(self.model_name)
        self.heap = Heap()
        self.adapters: dict[str, Path] = {}  # loaded ones, by the name requests give as model
        self.changing_adapters = asyncio.Lock()
        self._running: set[str] = set()
        defaults = msgspec.convert(self.options.mm_processor_kwargs, MediaKwargs)
        root = self.options.allowed_local_media_path
        rules = FetchRules(
            self.options.media_timeout_s,
            int(self.options.media_max_mb * (1 << 20)),
            self.options.allow_private_media,
            Path(root) if root else None,
        )
        self.media = MediaRules(
            rules,
            {"image": 16, "video": 2, **self.options.limit_mm_per_prompt},
            defaults,
            int(self.options.media_total_mb * (1 << 20)),
            self._expect_picture,
        )
        if self.backend is not None and self.state == "loading":
            self.state = "ready"

    def _expect_picture(self) -> None:
        if self.backend is not None:
            self.backend.expect_picture()

    @property
    def model_name(self) -> str:
        if self.options.served_model_name:
            return self.options.served_model_name[0]
        return Path(self.options.model).name if self.options.model else "duomo"

    @property
    def names(self) -> tuple[str, ...]:
        """What the model itself is called."""
        return self.options.served_model_name or (self.model_name,)

    def ready(self) -> Backend:
        """The backend, or the 503 that says why there is none."""
        if self.state == "ready" and self.backend is not None and not self.backend.is_alive:
            self.state, self.failure = "failed", "the engine has stopped"
        if self.state == "ready" and self.backend is not None:
            return self.backend
        said = {"loading": "the model is loading", "draining": "the server is shutting down"}
        raise Problem(
            503, self.state, said.get(self.state, self.failure or "the engine has failed"), Retry_After="5"
        )

    async def read(self, request: Request, kind: type[T]) -> tuple[T, dict[str, str]]:
        """The typed body, and the headers that name ignored fields."""
        body = await read_body(request, self.options.max_body_mb)
        call, unknown = decode(body, kind)
        if isinstance(call, Generation):
            self.check_model(call.model)
            if call.stream_options is not None and not call.stream:
                raise invalid("stream_options needs stream: true", "stream_options")
        if self.options.log_prompts:
            log.info("request body", extra={"body": body.decode("utf-8", "replace")})
        return call, ignored_header(unknown)

    def check_model(self, name: str) -> None:
        names = self.options.served_model_name
        if names and name not in (*names, *self.adapters, "default", ""):
            raise Problem(
                404,
                "model_not_found",
                f"there is no model {name[:80]!r}; {', '.join(names)} is served",
                param="model",
            )

    def adapter_of(self, name: str) -> str:
        """The adapter that a request's `model` names, or "" for the model itself."""
        return name if name in self.adapters else ""

    def abort_all(self) -> None:
        """Ends every running request; while draining each ends in an error that says so."""
        for job_id in [*self._running]:
            if self.backend is not None:
                self.backend.cancel(job_id)

    async def run(self, backend: Backend, job: Job) -> AsyncIterator[Piece]:
        """The pieces of one job, through the gate (429 if it is full), timed and counted.

        Closing it cancels the job.
        """
        self.gate.enter()  # here and not before: a generator that never starts never ends either
        watch = self.metrics.watch()
        started = time.monotonic()
        pieces = backend.stream(job)
        self._running.add(job.id)
        try:
            async for piece in pieces:
                if piece.text or piece.reasoning or piece.tools:
                    watch.token()
                if piece.finish_reason == "abort" and self.state == "draining":
                    raise Aborted("the server is shutting down")
                if piece.finish_reason is not None:
                    watch.reasons.append(piece.finish_reason)
                    if piece.usage is not None:
                        watch.usage(piece.usage)
                yield piece
        except Exception:
            watch.reasons.append("error")
            raise
        finally:
            self._running.discard(job.id)
            self.gate.leave(time.monotonic() - started)
            watch.close()
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


Endpoint = Callable[[Request], Awaitable[Response]]


def answers(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose every failure is an envelope; an unforeseen one is logged with its traceback."""

    @functools.wraps(endpoint)
    async def answered(request: Request) -> Response:
        server = server_of(request)
        try:
            check_caller(request.headers, server.options)
            server.keys.check(request.headers)
            return await endpoint(request)
        except ClientDisconnect:
            return Problem(499, "client_closed", "the client left before its request was whole").response()
        except Exception as error:
            problem = problem_of(error)
            if problem.code == "internal_error":
                log.error("unforeseen failure", exc_info=error)
            server.metrics.count(server.metrics.errors, problem.code)
            return problem.response()

    return answered


_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")


def request_id(request: Request, prefix: str = "", asked: str | None = None) -> str:
    """The client's own id where it is plain text, otherwise a new one; nothing that breaks a log line."""
    given = asked or request.headers.get("x-request-id", "")
    plain = given if given and _ID.fullmatch(given) else _new_id()
    return plain if plain.startswith(prefix) else prefix + plain


_SECRET, _numbers = os.urandom(32), itertools.count()


def _new_id() -> str:
    """Unique, not to be guessed, and without asking the system for randomness each time."""
    return hashlib.blake2b(next(_numbers).to_bytes(8, "big"), key=_SECRET, digest_size=16).hexdigest()


def json_response(value: object, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, headers=headers, media_type="application/json")
