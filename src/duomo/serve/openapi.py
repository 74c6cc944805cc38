"""/openapi.json, made from the very structs that decode and encode.

Nothing is described by hand but one line an endpoint, so the file cannot drift from the code. `serve.docs`
shows it as a page.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from duomo import __version__
from duomo.serve import adapters, decisions, health, messages, responses, schema
from duomo.serve.problems import ErrorEnvelope
from duomo.serve.server import json_response


class Operation(NamedTuple):
    method: str
    path: str
    summary: str
    takes: Any = None
    gives: Any = None
    can_stream: bool = False
    kind: str = "application/json"


_CHAT = (schema.ChatRequest, schema.ChatCompletion)
_COUNT = (messages.CountRequest, messages.MessagesCount)

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a conversation.", *_CHAT, True),
    Operation(
        "post", "/v1/chat/completions/input_tokens", "Count a conversation's tokens.",
        schema.ChatRequest, schema.InputTokens,
    ),
    Operation(
        "post", "/v1/chat/completions/control", "Answer now, or cancel.",
        health.ControlRequest, health.Controlled,
    ),
    Operation(
        "post", "/v1/completions", "Continue a text.", schema.CompletionRequest, schema.TextCompletion, True
    ),
    Operation(
        "post", "/v1/responses", "Answer in the format of Responses.",
        responses.ResponsesRequest, responses.ResponseOut, True,
    ),
    Operation(
        "post", "/v1/messages", "Answer in the format of Messages.",
        messages.MessagesRequest, messages.MessagesAnswer, True,
    ),
    Operation("post", "/v1/messages/count_tokens", "Count in the format of Messages.", *_COUNT),
    Operation(
        "post", "/v1/decisions", "Decide questions from logits.",
        decisions.DecisionsRequest, decisions.Decisions,
    ),
    Operation("get", "/v1/models", "The models served.", None, schema.ModelList),
    Operation("get", "/v1/models/{name}", "One model.", None, schema.ModelCard),
    Operation(
        "post", "/v1/load_lora_adapter", "Load an adapter, to be named as model.",
        adapters.LoadRequest, kind="text/plain",
    ),
    Operation(
        "post", "/v1/unload_lora_adapter", "Forget an adapter.", adapters.UnloadRequest, kind="text/plain"
    ),
    Operation("post", "/tokenize", "Ids of a text.", health.TokenizeRequest, health.Tokens),
    Operation("post", "/detokenize", "The text of ids.", health.DetokenizeRequest, health.Text),
    Operation(
        "get", "/health", "Whether the model answers: loading, ready, draining or failed.",
        None, health.Health,
    ),
    Operation("get", "/ping", "Whether the process lives.", None, health.Ping),
    Operation("get", "/version", "The version.", None, health.Version),
    Operation("get", "/load", "What runs and waits now.", None, health.Load),
    Operation("get", "/v1/residency", "Which weights are in memory.", None, health.Residency),
    Operation("get", "/metrics", "Prometheus metrics.", kind="text/plain"),
)  # fmt: skip


_EVENT = {  # one of a stream
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


@lru_cache(maxsize=1)
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    types = [t for o in OPERATIONS for t in (o.takes, o.gives) if t is not None] + [ErrorEnvelope]
    unique = list(dict.fromkeys(types))
    shown, components = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    refs: dict[Any, Any] = dict(zip(unique, shown, strict=True))
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "duomo", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _described(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    answer = refs[operation.gives] if operation.gives is not None else {"type": "object"}
    content: dict[str, Any] = {operation.kind: {"schema": answer}}
    if operation.kind != "application/json":
        content = {operation.kind: {"schema": {"type": "string"}}}
    if operation.can_stream:
        content["text/event-stream"] = {"schema": _EVENT}
    error = {"application/json": {"schema": refs[ErrorEnvelope]}}
    out: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "4XX": {"description": "The request cannot be answered as it is.", "content": error},
            "5XX": {"description": "The server cannot answer now.", "content": error},
        },
    }
    if operation.path == "/health":
        health_body = {"application/json": {"schema": refs[health.Health]}}
        out["responses"]["5XX"] = {"description": "Not ready.", "content": health_body}
    if operation.takes is not None:
        taken = {"application/json": {"schema": refs[operation.takes]}}
        out["requestBody"] = {"required": True, "content": taken}
    if "{name}" in operation.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        out["parameters"] = [name]
    return out


async def openapi(request: Request) -> Response:
    return json_response(document())
