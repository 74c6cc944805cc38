"""What goes wrong on the wire: OpenAI's envelope, and the one table from duomo's errors to HTTP statuses.

A `Problem` is an answer: status, stable code, the parameter at fault and one line. Errors of `duomo.errors`
become one by `STATUS_OF`; anything else is our bug and becomes a bare 500 whose text says nothing about
paths, addresses or code. A line that came from a file or a socket error is cleaned before it leaves.
"""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response

from duomo import errors


class Problem(Exception):
    """An error answer. `headers` are added to the response, as Retry-After is."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.message = clean(message)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def envelope(self) -> ErrorEnvelope:
        return ErrorEnvelope(ErrorBody(self.message, self.type, self.param, self.code))

    def response(self) -> Response:
        body = msgspec.json.encode(self.envelope())
        return Response(body, self.status, headers=self.headers, media_type="application/json")


class ErrorBody(msgspec.Struct):
    """`code` is stable and what programs should look at; `message` is for people and may change."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(msgspec.Struct):
    error: ErrorBody


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}

# From the most special to the most general: the first that fits decides.
STATUS_OF: tuple[tuple[type[errors.Error], int, str], ...] = (
    (errors.PromptTooLong, 400, "context_length_exceeded"),
    (errors.TemplateError, 400, "invalid_prompt"),
    (errors.PromptError, 400, "invalid_prompt"),
    (errors.UnsupportedMedia, 415, "unsupported_media"),
    (errors.MediaTooLarge, 413, "media_too_large"),
    (errors.FetchRefused, 400, "media_fetch_refused"),
    (errors.MediaError, 400, "invalid_media"),
    (errors.GrammarError, 400, "invalid_grammar"),
    (errors.ConfigError, 400, "invalid_value"),
    (errors.CheckpointError, 400, "invalid_checkpoint"),  # of an adapter: what is served was read before
    (errors.OutOfPages, 503, "out_of_memory"),
    (errors.Aborted, 503, "aborted"),
    (errors.EngineError, 503, "engine_error"),
)


def problem_of(error: BaseException) -> Problem:
    """The answer to any exception. An unforeseen one says only that it was ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, errors.Error):
        for kind, status, code in STATUS_OF:
            if isinstance(error, kind):
                param = error.facts.get("name") or error.facts.get("param")
                return Problem(status, code, error.message, param=str(param) if param else None)
    return Problem(500, "internal_error", "duomo failed on this request; the server's log says why")


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> Problem:
    return Problem(400, code, message, param=param)


_PATH = re.compile(r"(?<![\w/:.])/(?:[\w.+-]+/)+[\w.+-]*")
_ADDRESS = re.compile(r"\b(?:at )?0x[0-9a-fA-F]{6,}\b")


def clean(message: str) -> str:
    """One line without server paths, memory addresses or control characters, of at most 500 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    line = _ADDRESS.sub("an object", _PATH.sub("a file", line))
    return line if len(line) <= 500 else line[:497] + "..."
