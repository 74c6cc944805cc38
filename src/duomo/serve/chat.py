"""POST /v1/chat/completions, streamed and whole: both are made from the same pieces, so they cannot differ.

Order of a stream: per choice an opening chunk with the role, then deltas, then a chunk with finish_reason;
last a chunk without choices that holds the whole usage (if asked), and [DONE].
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import ExpertTrace, Usage, join_traces
from duomo.serve import convert, schema
from duomo.serve.backend import Job, Piece
from duomo.serve.problems import invalid
from duomo.serve.respond import Dialect, Spent, Whole, logprob_of, respond
from duomo.serve.server import Server, answers, json_response, request_id, server_of
from duomo.serve.stream import event
from duomo.serve.thinking import Thinking, resolve


@answers
async def create(request: Request) -> Response:
    """Answers a conversation."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, schema.ChatRequest)
    job, thinking = await job_of(server, call, request_id(request, "chatcmpl-", call.request_id))
    headers |= {"X-Duomo-Thinking": f"{thinking.mode}; decided_by={thinking.decided_by}"}
    dialect = Dialect(
        lambda pieces: chunks(server, call, job, thinking, pieces),
        lambda whole: completion_of(server, call, job, thinking, whole),
    )
    pieces = server.run(backend, job)
    return await respond(
        request, server, pieces, dialect, is_stream=bool(call.stream), n=job.params.n, headers=headers
    )


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
    params = convert.params_of(call, thinking, options.seed, most, logprobs, server.ready().facts.sampling)
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
        adapter=server.adapter_of(call.model),
    )
    return job, thinking


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
    whole: Whole,
) -> schema.ChatCompletion:
    shown = _shows_reasoning(call)
    out = []
    for index, answer in enumerate(whole.choices):
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
        if trace := join_traces(answer.traces):
            choice.experts = experts_out(trace)
        out.append(choice)
    name = call.model or server.model_name
    return schema.ChatCompletion(
        job.id, int(time.time()), name, out, usage_out(whole.usage), thinking_out(thinking, whole.mode)
    )


def _shows_reasoning(call: schema.ChatRequest) -> bool:
    return call.include_reasoning is not False and not (call.reasoning and call.reasoning.exclude)


async def chunks(
    server: Server, call: schema.ChatRequest, job: Job, thinking: Thinking, pieces: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """The events of a stream, without the end."""
    created, name = int(time.time()), call.model or server.model_name
    shown = _shows_reasoning(call)
    wants = call.stream_options or schema.StreamOptions(include_usage=False)
    is_plain = not (wants.continuous_usage_stats or call.return_token_ids)
    before, after = _around_text(
        schema.ChatChunk(job.id, created, name, [], None if wants.include_usage else UNSET)
    )
    spent, mode, opened = Spent(), None, set[int]()
    async for piece in pieces:
        spent.add(piece)
        mode = piece.thinking or mode
        if is_plain and 0 in opened and _is_text_alone(piece):  # nearly every piece is
            yield before + msgspec.json.encode(piece.text) + after
            continue
        choice = _chunk_choice(call, job, piece, shown)
        chunk = schema.ChatChunk(job.id, created, name, [choice])
        if wants.include_usage:
            chunk.usage = usage_out(spent.total) if wants.continuous_usage_stats else None
        told = b""
        if piece.index not in opened:
            opened.add(piece.index)
            opening = schema.ChunkChoice(piece.index, schema.Delta("assistant", ""))
            told = event(schema.ChatChunk(job.id, created, name, [opening], chunk.usage))
        if piece.finish_reason is not None:
            chunk.thinking = thinking_out(thinking, mode)
        if choice.delta != _NOTHING or piece.finish_reason is not None or piece.token_ids:
            told += event(chunk)
        if told:  # two events in one packet: each costs a call of the system
            yield told
    if wants.include_usage:
        end = usage_out(spent.total)
        yield event(schema.ChatChunk(job.id, created, name, [], end, thinking_out(thinking, mode)))


_NOTHING = schema.Delta()


def _is_text_alone(piece: Piece) -> bool:
    """Of choice 0, and nothing else with it that a client is told."""
    told = piece.index or piece.reasoning or piece.tools or piece.logprobs or piece.experts
    return bool(piece.text) and not told and piece.finish_reason is None


def _around_text(chunk: schema.ChatChunk) -> tuple[bytes, bytes]:
    """The bytes of such a piece's event before and after its text: only that is encoded for each."""
    mark = "\0"
    choice = schema.ChunkChoice(0, schema.Delta(content=mark))
    whole = event(msgspec.structs.replace(chunk, choices=[choice]))
    before, _, after = whole.rpartition(
        msgspec.json.encode(mark)
    )  # a model may be called so, and comes first
    return before, after


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
    if piece.experts is not None:
        choice.experts = experts_out(piece.experts)
    return choice


def experts_out(trace: ExpertTrace) -> schema.ExpertsOut:
    flags = f"0{''.join(map(str, trace.is_vision))}0"
    borders = [trace.start + place for place in range(len(flags) - 1) if flags[place] != flags[place + 1]]
    spans = list(zip(borders[::2], borders[1::2], strict=True))
    ids = base64.b64encode(trace.expert_ids).decode()
    return schema.ExpertsOut(
        trace.start, len(trace.is_vision), trace.num_layers, trace.num_chosen, ids, spans
    )


@answers
async def count(request: Request) -> Response:
    """Tokens a chat request would take, pictures included, without running it."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, schema.ChatRequest)
    job, _ = await job_of(server, call, request_id(request, "count-"))
    counted = await backend.count(job)
    return json_response(
        schema.InputTokens(
            counted.prompt_tokens,
            counted.image_tokens,
            counted.video_tokens,
            list(counted.media_tokens),
            backend.facts.max_model_len,
        ),
        headers,
    )
