"""POST /v1/chat/completions, streamed and whole: both are made from the same pieces, so they cannot differ.

Order of a stream: per choice an opening chunk with the role, then deltas, then a chunk with finish_reason;
last a chunk without choices that holds the whole usage (if asked), and [DONE].
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import Usage
from duomo.serve import convert, schema
from duomo.serve.backend import Job, Piece, TokenInfo
from duomo.serve.problems import Problem, invalid
from duomo.serve.server import Server, answers, json_response, request_id, server_of
from duomo.serve.stream import EventStream, event, first_or_late, unless_gone
from duomo.serve.thinking import Thinking, resolve


@dataclass(slots=True)
class Answer:
    """One choice as it grows."""

    text: str = ""
    reasoning: str = ""
    tools: dict[int, schema.ToolCallOut] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[schema.TokenLogprob] = field(default_factory=list)
    finish_reason: schema.Finish = "stop"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.token_ids += piece.token_ids
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


@answers
async def create(request: Request) -> Response:
    """Answers a conversation."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, schema.ChatRequest)
    job, thinking = await job_of(server, call, request_id(request, "chatcmpl-", call.request_id))
    headers |= {"X-Duomo-Thinking": f"{thinking.mode}; decided_by={thinking.decided_by}"}
    pieces = server.run(backend, job)
    if call.stream:
        ready = await first_or_late(pieces, server.options.keep_alive_s)
        events = chunks(server, call, job, thinking, ready)
        options = server.options
        return EventStream(
            events, headers=headers, keep_alive_s=options.keep_alive_s, slow_client_s=options.slow_client_s
        )
    whole = await unless_gone(request, gather(pieces, job.params.n))
    if whole is None:
        raise Problem(499, "client_closed", "the client left before the answer")
    return json_response(completion_of(server, call, job, thinking, *whole), headers)


async def job_of(server: Server, call: schema.ChatRequest, job_id: str) -> tuple[Job, Thinking]:
    """The request in duomo's terms, with its media fetched."""
    if call.max_tokens and call.max_completion_tokens and call.max_tokens != call.max_completion_tokens:
        raise invalid("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    most = call.max_completion_tokens or call.max_tokens
    if call.top_logprobs and not call.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    options = server.options
    thinking = resolve(call, options.thinking, options.reasoning_max_tokens, most)  # type: ignore[arg-type]
    logprobs = (call.top_logprobs or 0) if call.logprobs else None
    tools, choice = convert.tools_of(call)
    params = convert.params_of(call, thinking, options.seed, most, logprobs)
    if tools and choice not in ("auto", "none") and params.constraint is not None:
        raise invalid("a forced tool call and a constrained answer exclude each other", "response_format")
    job = Job(
        job_id,
        params,
        await convert.messages_of(call, server.media),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=call.parallel_tool_calls is not False,
        priority=call.priority or 0,
        cache_salt=call.cache_salt or "",
    )
    return job, thinking


async def gather(pieces: AsyncIterator[Piece], n: int) -> tuple[list[Answer], Usage, str | None]:
    """All choices whole, the usage of all of them, and the thinking mode in effect."""
    choices = [Answer() for _ in range(n)]
    usage, mode = Usage(), None
    async for piece in pieces:
        choices[piece.index].add(piece)
        usage = added(usage, piece.usage)
        mode = piece.thinking or mode
    return choices, usage, mode


def added(total: Usage, more: Usage | None) -> Usage:
    """Usage over choices: the prompt counts once, what is made adds up."""
    if more is None:
        return total
    return Usage(
        more.prompt_tokens,
        total.completion_tokens + more.completion_tokens,
        total.reasoning_tokens + more.reasoning_tokens,
        max(total.cached_tokens, more.cached_tokens),
        more.image_tokens,
        more.video_tokens,
    )


def usage_out(usage: Usage) -> schema.UsageOut:
    return schema.UsageOut(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        schema.PromptDetails(usage.cached_tokens, usage.image_tokens, usage.video_tokens),
        schema.CompletionDetails(usage.reasoning_tokens),
    )


def thinking_out(thinking: Thinking, mode: str | None) -> schema.ThinkingOut:
    """What was in effect. The backend reports the mode, since auto becomes on or off there."""
    return schema.ThinkingOut(mode or thinking.mode, thinking.budget, thinking.decided_by)  # type: ignore[arg-type]


def completion_of(
    server: Server,
    call: schema.ChatRequest,
    job: Job,
    thinking: Thinking,
    choices: list[Answer],
    usage: Usage,
    mode: str | None,
) -> schema.ChatCompletion:
    shown = call.include_reasoning is not False and not (call.reasoning and call.reasoning.exclude)
    out = []
    for index, answer in enumerate(choices):
        reasoning = answer.reasoning if shown and answer.reasoning else None
        message = schema.ChatAnswer(
            "assistant", answer.text or (None if answer.tools else ""), reasoning, reasoning
        )
        if answer.tools:
            message.tool_calls = [answer.tools[i] for i in sorted(answer.tools)]
        logprobs = schema.ChatLogprobs(answer.logprobs) if job.params.logprobs is not None else None
        choice = schema.ChatChoice(index, message, answer.finish_reason, logprobs)
        if call.return_token_ids:
            choice.token_ids = answer.token_ids
        out.append(choice)
    name = call.model or server.model_name
    return schema.ChatCompletion(
        job.id, int(time.time()), name, out, usage_out(usage), thinking_out(thinking, mode)
    )


async def chunks(
    server: Server, call: schema.ChatRequest, job: Job, thinking: Thinking, pieces: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """The events of a stream. Closing it closes the pieces, which cancels the job."""
    created, name = int(time.time()), call.model or server.model_name
    shown = call.include_reasoning is not False and not (call.reasoning and call.reasoning.exclude)
    wants = call.stream_options or schema.StreamOptions(include_usage=False)
    usage, mode, opened = Usage(), None, set[int]()
    made = 0
    try:
        async for piece in pieces:
            usage, mode = added(usage, piece.usage), piece.thinking or mode
            made += len(piece.token_ids)
            choice = _chunk_choice(call, job, piece, shown)
            chunk = schema.ChatChunk(job.id, created, name, [choice])
            if wants.include_usage:
                chunk.usage = (
                    usage_out(Usage(usage.prompt_tokens, made)) if wants.continuous_usage_stats else None
                )
            if piece.index not in opened:
                opened.add(piece.index)
                opening = schema.ChunkChoice(piece.index, schema.Delta("assistant", ""))
                yield event(schema.ChatChunk(job.id, created, name, [opening], chunk.usage))
            if piece.finish_reason is not None:
                chunk.thinking = thinking_out(thinking, mode)
            if choice.delta != schema.Delta() or piece.finish_reason is not None or piece.token_ids:
                yield event(chunk)
        if wants.include_usage:
            yield event(
                schema.ChatChunk(job.id, created, name, [], usage_out(usage), thinking_out(thinking, mode))
            )
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()


def _chunk_choice(call: schema.ChatRequest, job: Job, piece: Piece, shown: bool) -> schema.ChunkChoice:
    reasoning = piece.reasoning if shown and piece.reasoning else UNSET
    delta = schema.Delta(UNSET, piece.text or UNSET, reasoning, reasoning)
    if any(not tool.is_broken for tool in piece.tools):
        delta.tool_calls = [
            schema.ToolCallDelta(
                tool.index,
                tool.id,
                "function" if tool.id else None,
                schema.FunctionDelta(tool.name, tool.arguments),
            )
            for tool in piece.tools
            if not tool.is_broken
        ]
    choice = schema.ChunkChoice(piece.index, delta, piece.finish_reason)
    if job.params.logprobs is not None and piece.logprobs:
        choice.logprobs = schema.ChatLogprobs([logprob_of(info) for info in piece.logprobs])
    if call.return_token_ids:
        choice.token_ids = list(piece.token_ids)
    return choice


def logprob_of(info: TokenInfo) -> schema.TokenLogprob:
    top = [schema.TopLogprob(text, value, list(data)) for text, value, data in info.top]
    return schema.TokenLogprob(info.text, info.logprob, list(info.data), top)


@answers
async def count(request: Request) -> Response:
    """Tokens a chat request would take, pictures included, without running it."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, schema.ChatRequest)
    job, _ = await job_of(server, call, request_id(request, "count-"))
    counted = await backend.count(job)
    return json_response(
        {
            "object": "chat.completion.input_tokens",
            "input_tokens": counted.prompt_tokens,
            "image_tokens": counted.image_tokens,
            "video_tokens": counted.video_tokens,
            "media_tokens": list(counted.media_tokens),
            "max_model_len": backend.facts.max_model_len,
        },
        headers,
    )
