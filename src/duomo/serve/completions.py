"""POST /v1/completions: raw prompts, as text or ids, one or several; no template and no thinking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import Usage
from duomo.serve import convert, schema
from duomo.serve.backend import Job, Piece, TokenInfo
from duomo.serve.chat import Answer, added, gather, usage_out
from duomo.serve.problems import Problem, invalid
from duomo.serve.server import Server, answers, json_response, request_id, server_of
from duomo.serve.stream import EventStream, event, first_or_late, unless_gone
from duomo.serve.thinking import Thinking

_OFF = Thinking("off", None, "completions")


@answers
async def create(request: Request) -> Response:
    """Continues prompts."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, schema.CompletionRequest)
    jobs = jobs_of(server, call, request_id(request, "cmpl-", call.request_id))
    if call.stream:
        if len(jobs) > 1:
            raise invalid("a stream takes one prompt; send several requests", "prompt")
        ready = await first_or_late(server.run(backend, jobs[0]), server.options.keep_alive_s)
        return EventStream(
            chunks(server, call, jobs[0], ready),
            headers=headers,
            keep_alive_s=server.options.keep_alive_s,
            slow_client_s=server.options.slow_client_s,
        )
    entered = [server.run(backend, job) for job in jobs]
    whole = await unless_gone(request, _all(entered, call.n or 1))
    if whole is None:
        raise Problem(499, "client_closed", "the client left before the answer")
    usage = Usage()
    choices: list[schema.TextChoice] = []
    for job, (texts, used, _) in zip(jobs, whole, strict=True):
        prompt_tokens = usage.prompt_tokens
        usage = added(usage, used)
        usage = Usage(prompt_tokens + used.prompt_tokens, usage.completion_tokens, 0, used.cached_tokens)
        for answer in texts:
            text = (job.prompt if call.echo and isinstance(job.prompt, str) else "") + answer.text
            choice = schema.TextChoice(len(choices), text, answer.finish_reason)
            if call.return_token_ids:
                choice.token_ids = answer.token_ids
            if call.logprobs is not None:
                choice.logprobs = _logprobs([_info(entry) for entry in answer.logprobs])
            choices.append(choice)
    name = call.model or server.model_name
    return json_response(
        schema.TextCompletion(jobs[0].id, int(time.time()), name, choices, usage_out(usage)), headers
    )


async def _all(entered: list[AsyncIterator[Piece]], n: int) -> list[tuple[list[Answer], Usage, str | None]]:
    return list(await asyncio.gather(*(gather(pieces, n) for pieces in entered)))


def jobs_of(server: Server, call: schema.CompletionRequest, job_id: str) -> list[Job]:
    if call.suffix:
        raise invalid("suffix is not something this model can do", "suffix")
    if call.best_of is not None and call.best_of != (call.n or 1):
        raise invalid("best_of other than n is not offered", "best_of")
    params = convert.params_of(call, _OFF, server.options.seed, call.max_tokens or 16, call.logprobs)
    prompts = prompts_of(call.prompt)
    ids = [job_id] if len(prompts) == 1 else [f"{job_id}-{index}" for index in range(len(prompts))]
    return [Job(i, params, prompt=prompt) for i, prompt in zip(ids, prompts, strict=True)]


def prompts_of(prompt: str | list[str | int | list[int]]) -> list[str | tuple[int, ...]]:
    """One prompt or several; a list of numbers is one prompt."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt is empty", "prompt")
    if all(isinstance(item, int) for item in prompt):
        return [tuple(item for item in prompt if isinstance(item, int))]
    if any(isinstance(item, int) or not item for item in prompt):
        raise invalid("prompt must be texts, or lists of token ids, none of them empty", "prompt")
    if len(prompt) > 64:
        raise invalid("at most 64 prompts are allowed in one request", "prompt")
    return [item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)]


async def chunks(
    server: Server, call: schema.CompletionRequest, job: Job, pieces: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    created, name, usage = int(time.time()), call.model or server.model_name, Usage()
    wants = call.stream_options or schema.StreamOptions(include_usage=False)
    try:
        if call.echo and isinstance(job.prompt, str):
            echo = schema.TextChoice(0, job.prompt, None)
            yield event(schema.TextCompletion(job.id, created, name, [echo]))
        async for piece in pieces:
            usage = added(usage, piece.usage)
            choice = schema.TextChoice(piece.index, piece.text, piece.finish_reason)
            if call.logprobs is not None and piece.logprobs:
                choice.logprobs = _logprobs(piece.logprobs)
            chunk = schema.TextCompletion(job.id, created, name, [choice])
            if wants.include_usage:
                chunk.usage = None
            yield event(chunk)
        if wants.include_usage:
            yield event(schema.TextCompletion(job.id, created, name, [], usage_out(usage)))
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()


def _info(entry: schema.TokenLogprob) -> TokenInfo:
    top = tuple((t.token, t.logprob, bytes(t.bytes or ())) for t in entry.top_logprobs)
    return TokenInfo(entry.token, entry.logprob, bytes(entry.bytes or ()), top)


def _logprobs(infos: list[TokenInfo] | tuple[TokenInfo, ...]) -> schema.TextLogprobs:
    offsets, at = [], 0
    for info in infos:
        offsets.append(at)
        at += len(info.text)
    return schema.TextLogprobs(
        [info.text for info in infos],
        [info.logprob for info in infos],
        [{text: value for text, value, _ in info.top} for info in infos],
        offsets,
    )
