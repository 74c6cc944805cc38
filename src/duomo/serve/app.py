"""The ASGI application: routes, request ids, one log line a request. Everything else has its own file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duomo.serve import adapters, chat, completions, decisions, docs, health, messages, openapi, responses
from duomo.serve.backend import Backend
from duomo.serve.options import Options
from duomo.serve.problems import Problem
from duomo.serve.server import Server, request_id

if TYPE_CHECKING:
    from duomo.llm import LLM

log = logging.getLogger("duomo.access")
_QUIET = ("/health", "/ping", "/metrics", "/load")  # asked every few seconds by machines
_UI = Path(__file__).parent / "ui"
_UI_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(backend: Backend | LLM | None = None, options: Options | None = None) -> Starlette:
    """The application over an open LLM, or over any other backend.

    Without one it is loading until `app.state.server.backend` is set and its state is ready.
    """
    options = options or Options()
    if backend is not None and not hasattr(backend, "facts"):
        from duomo.serve.engine import Model

        backend = Model(backend)
    middleware = [Middleware(_Outer)]
    if options.cors_origin:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.cors_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Api-Key"],
            )
        )
    app = Starlette(
        routes=routes(options), middleware=middleware, exception_handlers={HTTPException: _no_such_route}
    )
    app.state.server = Server(options, cast("Backend | None", backend))
    return app


def routes(options: Options) -> list[BaseRoute]:
    post = [
        ("/v1/chat/completions", chat.create),
        ("/v1/chat/completions/input_tokens", chat.count),
        ("/v1/chat/completions/control", health.control),
        ("/v1/completions", completions.create),
        ("/v1/responses", responses.create),
        ("/v1/messages", messages.create),
        ("/v1/messages/count_tokens", messages.count),
        ("/v1/decisions", decisions.create),
        ("/v1/load_lora_adapter", adapters.load),
        ("/v1/unload_lora_adapter", adapters.unload),
        ("/tokenize", health.tokenize),
        ("/detokenize", health.detokenize),
    ]
    get = [
        ("/v1/models", health.models),
        ("/v1/models/{name:path}", health.model),
        ("/health", health.health),
        ("/version", health.version),
        ("/load", health.load),
        ("/v1/residency", health.residency),
        ("/metrics", health.metrics),
    ]
    table: list[BaseRoute] = [Route(path, endpoint, methods=["POST"]) for path, endpoint in post]
    table += [Route(path, endpoint, methods=["GET"]) for path, endpoint in get]
    table.append(Route("/ping", health.ping, methods=["GET", "POST"]))
    if options.docs:
        table += [Route("/openapi.json", openapi.openapi), Route("/docs", docs.docs)]
    if options.page:
        table += [Route("/", _page, methods=["GET"]), Route("/ui/{name}", _page, methods=["GET"])]
    return table


async def _page(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    files = {path.name: path for path in _UI.iterdir()} if _UI.is_dir() else {}
    if name not in files:
        raise HTTPException(404)
    return FileResponse(files[name], headers=_UI_HEADERS)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    if status == 405:
        allowed = (error.headers or {}).get("Allow", "") if isinstance(error, HTTPException) else ""
        said = f"{request.method} is not for this path; {allowed} is"
        return Problem(405, "method_not_allowed", said, Allow=allowed).response()
    return Problem(404, "not_found", "there is nothing at this path; /docs lists what there is").response()


class _Outer:
    """Gives every answer its X-Request-Id and writes one line to the access log, without any body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, start, status = Request(scope), time.perf_counter(), 500
        identity = request_id(request)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        scope["duomo.send"] = send  # for the pieces of a stream, past what looks at the first message alone
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            server: Server = scope["app"].state.server
            route = scope.get("route")
            path = getattr(route, "path", "other")
            server.metrics.count(server.metrics.requests, path, str(status))
            if path not in _QUIET:
                server.heap.used()
            log.log(
                logging.DEBUG if path in _QUIET else logging.INFO,
                "request",
                extra={
                    "request_id": identity,
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "ms": round((time.perf_counter() - start) * 1000, 1),
                },
            )
