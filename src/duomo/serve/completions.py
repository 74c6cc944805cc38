"""POST /v1/completions: raw prompts, as text or ids, one or several; no template and no thinking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import Usage
from duomo.serve import convert, schema
from duomo.serve.backend import Job, Piece, TokenInfo
from duomo.serve.chat import usage_out
from duomo.serve.problems import invalid
from duomo.serve.respond import Dialect, Spent, Whole, gather, respond, stayed
from duomo.serve.server import Server, answers, json_response, request_id, server_of
from duomo.serve.stream import event, unless_gone
from duomo.serve.thinking import Thinking

_OFF = Thinking("off", None, "completions")


@answers
async def create(request: Request) -> Response:
    """Continues prompts."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, schema.CompletionRequest)
    jobs = jobs_of(server, call, request_id(request, "cmpl-", call.request_id))
    if call.stream and len(jobs) > 1:
        raise invalid("a stream takes one prompt; send several requests", "prompt")
    if len(jobs) == 1:
        job = jobs[0]
        dialect = Dialect(
            lambda pieces: chunks(server, call, job, pieces),
            lambda whole: completion_of(server, call, jobs, [whole]),
        )
        pieces = server.run(backend, job)
        return await respond(
            request, server, pieces, dialect, is_stream=bool(call.stream), n=call.n or 1, headers=headers
        )
    entered = [server.run(backend, job) for job in jobs]
    wholes = stayed(await unless_gone(request, _all(entered, call.n or 1)))
    return json_response(completion_of(server, call, jobs, wholes), headers)


async def _all(entered: list[AsyncIterator[Piece]], n: int) -> list[Whole]:
    return list(await asyncio.gather(*(gather(pieces, n) for pieces in entered)))


def completion_of(
    server: Server, call: schema.CompletionRequest, jobs: list[Job], wholes: list[Whole]
) -> schema.TextCompletion:
    choices: list[schema.TextChoice] = []
    for job, whole in zip(jobs, wholes, strict=True):
        for answer in whole.choices:
            text = (job.prompt if call.echo and isinstance(job.prompt, str) else "") + answer.text
            choice = schema.TextChoice(len(choices), text, answer.finish_reason)
            if call.return_token_ids:
                choice.token_ids = answer.token_ids
            if call.logprobs is not None:
                choice.logprobs = _logprobs([_info(entry) for entry in answer.logprobs])
            choices.append(choice)
    usage = Usage(
        sum(whole.usage.prompt_tokens for whole in wholes),
        sum(whole.usage.completion_tokens for whole in wholes),
        cached_tokens=sum(whole.usage.cached_tokens for whole in wholes),
    )
    name = call.model or server.model_name
    return schema.TextCompletion(jobs[0].id, int(time.time()), name, choices, usage_out(usage))


def jobs_of(server: Server, call: schema.CompletionRequest, job_id: str) -> list[Job]:
    if call.suffix:
        raise invalid("suffix is not something this model can do", "suffix")
    if call.best_of is not None and call.best_of != (call.n or 1):
        raise invalid("best_of other than n is not offered", "best_of")
    defaults = server.ready().facts.sampling
    params = convert.params_of(
        call, _OFF, server.options.seed, call.max_tokens or 16, call.logprobs, defaults
    )
    prompts = prompts_of(call.prompt)
    ids = [job_id] if len(prompts) == 1 else [f"{job_id}-{index}" for index in range(len(prompts))]
    more: dict[str, Any] = {
        "priority": call.priority or 0,
        "cache_salt": call.cache_salt or "",
        "adapter": server.adapter_of(call.model),
    }
    return [Job(i, params, prompt=prompt, **more) for i, prompt in zip(ids, prompts, strict=True)]


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
    created, name, spent = int(time.time()), call.model or server.model_name, Spent()
    wants = call.stream_options or schema.StreamOptions(include_usage=False)
    if call.echo and isinstance(job.prompt, str):
        for index in range(call.n or 1):
            echo = schema.TextChoice(index, job.prompt, None)
            yield event(schema.TextCompletion(job.id, created, name, [echo]))
    async for piece in pieces:
        spent.add(piece)
        choice = schema.TextChoice(piece.index, piece.text, piece.finish_reason)
        if call.logprobs is not None and piece.logprobs:
            choice.logprobs = _logprobs(piece.logprobs)
        if call.return_token_ids:
            choice.token_ids = list(piece.token_ids)
        chunk = schema.TextCompletion(job.id, created, name, [choice])
        if wants.include_usage:
            chunk.usage = usage_out(spent.total) if wants.continuous_usage_stats else None
        yield event(chunk)
    if wants.include_usage:
        yield event(schema.TextCompletion(job.id, created, name, [], usage_out(spent.total)))


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
