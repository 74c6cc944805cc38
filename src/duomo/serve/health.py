"""Questions about the server itself: health, version, load, metrics, models, tokens, running requests."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from duomo import __version__
from duomo.serve import schema
from duomo.serve.limits import check_caller
from duomo.serve.problems import Problem
from duomo.serve.server import Server, answers, json_response, server_of


class Health(msgspec.Struct):
    status: Literal["loading", "ready", "draining", "failed"]


class Ping(msgspec.Struct):
    status: Literal["alive"] = "alive"


class Version(msgspec.Struct):
    version: str


class Residency(msgspec.Struct):
    """By part of the model: bytes, resident_bytes, cached_bytes and idle_s, where they are known."""

    parts: dict[str, dict[str, float | None]]


Load = dict[str, float]  # server_load, and the engine's gauges and counters by their names


async def health(request: Request) -> Response:
    """200 when ready, 503 while loading or draining, 500 when failed. Open to anybody."""
    server = server_of(request)
    if server.state == "ready" and (server.backend is None or not server.backend.is_alive):
        server.state, server.failure = "failed", "the engine has stopped"
    status = {"ready": 200, "failed": 500}.get(server.state, 503)
    return json_response(Health(server.state), status=status)


async def ping(request: Request) -> Response:
    """200 while this process lives, whatever the engine does."""
    return json_response(Ping())


async def version(request: Request) -> Response:
    return json_response(Version(__version__))


async def metrics(request: Request) -> Response:
    server = server_of(request)
    try:
        check_caller(request.headers, server.options)
        if server.options.metrics_need_key:
            server.keys.check(request.headers)
    except Problem as problem:
        return problem.response()
    now = await _gauges(server)
    return Response(server.metrics.exposition(now), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _gauges(server: Server) -> dict[str, float]:
    """Asked off the event loop: an engine in its own process answers when it gets to it."""
    backend = server.backend
    return dict(await asyncio.to_thread(backend.gauges)) if backend else {}


@answers
async def load(request: Request) -> Response:
    """What runs and waits at this moment."""
    server = server_of(request)
    now = await _gauges(server)
    told: Load = {"server_load": server.gate.inside, **now}
    return json_response(told)


@answers
async def residency(request: Request) -> Response:
    """Which weights are in memory now, by part of the model; empty where they are not packed."""
    found = await asyncio.to_thread(server_of(request).ready().residency)
    return json_response(Residency({part: dict(row) for part, row in found.items()}))


@answers
async def models(request: Request) -> Response:
    return json_response(schema.ModelList([card(request, name) for name in _names(request)]))


@answers
async def model(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _names(request):
        raise Problem(404, "model_not_found", f"there is no model {name[:80]!r}", param="model")
    return json_response(card(request, name))


def _names(request: Request) -> tuple[str, ...]:
    server = server_of(request)
    return (*server.names, *server.adapters)


def card(request: Request, name: str) -> schema.ModelCard:
    server = server_of(request)
    facts = server.ready().facts
    experts = schema.ExpertCounts(*facts.num_experts) if facts.num_experts else None
    folder = server.adapters.get(name)
    return schema.ModelCard(
        name,
        server.started,
        facts.max_model_len,
        folder.name if folder else facts.name,
        list(facts.modalities),
        experts,
        server.model_name if folder else None,
    )


class TokenizeRequest(msgspec.Struct):
    prompt: str
    model: str = ""


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]
    model: str = ""


class Text(msgspec.Struct):
    prompt: str


@answers
async def tokenize(request: Request) -> Response:
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, TokenizeRequest)
    ids = backend.encode(call.prompt)
    return json_response(Tokens(len(ids), backend.facts.max_model_len, ids), headers)


@answers
async def detokenize(request: Request) -> Response:
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, DetokenizeRequest)
    return json_response(Text(backend.decode(call.tokens)), headers)


class ControlRequest(msgspec.Struct):
    """`answer_now` ends the thinking of a running request; `cancel` ends the request."""

    id: str
    action: Literal["answer_now", "reasoning_end", "cancel"]


class Controlled(ControlRequest):
    done: bool = True


@answers
async def control(request: Request) -> Response:
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, ControlRequest)
    act = backend.cancel if call.action == "cancel" else backend.answer_now
    done = act(call.id)
    if not done:
        raise Problem(404, "request_not_found", "no request of this id is running in that state", param="id")
    return json_response(Controlled(call.id, call.action), headers)
