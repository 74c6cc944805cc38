"""The one way an answer leaves, whole or streamed, whatever dialect it is written in.

Chat, text completions, Responses and Messages differ in how they write pieces down; how a request is run,
watched for a client that leaves, begun as a stream, kept alive, failed and ended is here, once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import ExpertTrace, Usage
from duomo.serve import schema
from duomo.serve.backend import Piece, TokenInfo
from duomo.serve.problems import Problem
from duomo.serve.server import Server, json_response
from duomo.serve.stream import DONE, EventStream, error_event, first_or_late, unless_gone

T = TypeVar("T")


@dataclass(slots=True)
class Answer:
    """One choice as it grows."""

    text: str = ""
    reasoning: str = ""
    tools: dict[int, schema.ToolCallOut] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    traces: list[ExpertTrace] = field(default_factory=list)
    logprobs: list[schema.TokenLogprob] = field(default_factory=list)
    finish_reason: schema.Finish = "stop"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.token_ids += piece.token_ids
        if piece.experts is not None:
            self.traces.append(piece.experts)
        self.logprobs += [logprob_of(info) for info in piece.logprobs]
        for tool in piece.tools:
            if tool.is_broken:  # its text came as text
                self.tools.pop(tool.index, None)
                continue
            call = self.tools.setdefault(tool.index, schema.ToolCallOut("", schema.FunctionOut("", "")))
            call.id, call.function.name = tool.id or call.id, tool.name or call.function.name
            call.function.arguments += tool.arguments
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason


class Spent:
    """Usage over the choices of one request: the prompt counts once, what is made adds up."""

    def __init__(self) -> None:
        self._by_choice: dict[int, Usage] = {}

    def add(self, piece: Piece) -> None:
        if piece.usage is not None:
            self._by_choice[piece.index] = piece.usage

    @property
    def total(self) -> Usage:
        each = list(self._by_choice.values())
        if not each:
            return Usage()
        first = each[0]
        return Usage(
            first.prompt_tokens,
            sum(usage.completion_tokens for usage in each),
            sum(usage.reasoning_tokens for usage in each),
            max(usage.cached_tokens for usage in each),
            first.image_tokens,
            first.video_tokens,
        )


@dataclass(slots=True)
class Whole:
    """All choices of a request, their usage together, and the thinking mode in effect."""

    choices: list[Answer]
    usage: Usage
    mode: str | None


@dataclass(frozen=True, slots=True)
class Dialect:
    """How answers are written: `events` as they come, `whole` at the end; `end` and `fail` close a stream."""

    events: Callable[[AsyncIterator[Piece]], AsyncIterator[bytes]]
    whole: Callable[[Whole], object]
    end: bytes = DONE
    fail: Callable[[BaseException], bytes] = error_event


async def respond(
    request: Request,
    server: Server,
    pieces: AsyncIterator[Piece],
    dialect: Dialect,
    *,
    is_stream: bool,
    n: int,
    headers: dict[str, str],
) -> Response:
    """The answer made of `pieces`. What is wrong with the prompt is raised before a stream begins."""
    if is_stream:
        ready = await first_or_late(pieces, server.options.keep_alive_s)
        return EventStream(
            dialect.events(ready),
            ready,
            headers=headers,
            keep_alive_s=server.options.keep_alive_s,
            slow_client_s=server.options.slow_client_s,
            end=dialect.end,
            fail=dialect.fail,
        )
    whole = await unless_gone(request, gather(pieces, n))
    return json_response(dialect.whole(stayed(whole)), headers)


def stayed(result: T | None) -> T:
    """The result of work whose client did not leave; 499, for the log alone, if it did."""
    if result is None:
        raise Problem(499, "client_closed", "the client left before the answer")
    return result


async def gather(pieces: AsyncIterator[Piece], n: int) -> Whole:
    choices, spent, mode = [Answer() for _ in range(n)], Spent(), None
    async for piece in pieces:
        choices[piece.index].add(piece)
        spent.add(piece)
        mode = piece.thinking or mode
    return Whole(choices, spent.total, mode)


def logprob_of(info: TokenInfo) -> schema.TokenLogprob:
    top = [schema.TopLogprob(text, value, list(data)) for text, value, data in info.top]
    return schema.TokenLogprob(info.text, info.logprob, list(info.data), top)
