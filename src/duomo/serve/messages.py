"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect over the same road as chat.

A request is rewritten into a `ChatRequest` and then treated exactly like one, so thinking, media rules and
limits are the same. Signatures of thinking blocks are empty: there is nothing to verify here.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import Usage
from duomo.serve import schema
from duomo.serve.backend import Job, Piece
from duomo.serve.chat import job_of
from duomo.serve.problems import problem_of
from duomo.serve.respond import Dialect, Spent, Whole, respond
from duomo.serve.server import answers, json_response, request_id, server_of
from duomo.serve.stream import event


class TextBlock(Struct, tag="text", tag_field="type"):
    text: str


class Base64Source(Struct, tag="base64", tag_field="type"):
    media_type: str
    data: str


class UrlSource(Struct, tag="url", tag_field="type"):
    url: str


class ImageBlock(Struct, tag="image", tag_field="type"):
    source: Base64Source | UrlSource


class ThinkingBlock(Struct, tag="thinking", tag_field="type"):
    thinking: str
    signature: str = ""


class ToolUseBlock(Struct, tag="tool_use", tag_field="type"):
    id: str
    name: str
    input: schema.Object


class ToolResultBlock(Struct, tag="tool_result", tag_field="type"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock] | None = None
    is_error: bool = False


Block = TextBlock | ImageBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Turn(Struct):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class MessagesTool(Struct):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
    input_schema: schema.Object = {}
    description: str | None = None


class MessagesChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountRequest(Struct, kw_only=True):
    model: str = ""
    messages: list[Turn]
    system: str | list[TextBlock] | None = None
    tools: list[MessagesTool] | None = None
    tool_choice: MessagesChoice | None = None
    thinking: schema.ThinkingSwitch | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: schema.Positive
    stream: bool | None = None
    temperature: schema.Fraction | None = None
    top_p: schema.Fraction | None = None
    top_k: schema.Count | None = None
    stop_sequences: schema.Strings | None = None
    metadata: schema.Object | None = None


class MessagesUsage(Struct):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0


class MessagesAnswer(Struct):
    id: str
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: str | None
    usage: MessagesUsage
    stop_sequence: str | None = None
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class MessagesCount(Struct):
    input_tokens: int


_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def chat_of(call: CountRequest) -> schema.ChatRequest:
    """The same question in OpenAI's words. Thinking is off unless asked for, as that dialect has it."""
    turns: list[schema.ChatMessage] = []
    if call.system:
        text = call.system if isinstance(call.system, str) else "\n".join(block.text for block in call.system)
        turns.append(schema.ChatMessage("system", text))
    for turn in call.messages:
        turns += _turns_of(turn)
    choice = call.tool_choice
    chosen: schema.ToolChoice | None = None
    if choice is not None:
        named = schema.NamedTool(schema.NamedFunction(choice.name or ""))
        chosen = named if choice.type == "tool" else "required" if choice.type == "any" else None
        chosen = "none" if choice.type == "none" else chosen
    request = schema.ChatRequest(
        model=call.model,
        messages=turns,
        tools=[
            schema.ToolSpec(schema.FunctionSpec(tool.name, tool.description, tool.input_schema))
            for tool in call.tools or ()
        ]
        or None,
        tool_choice=chosen,
        parallel_tool_calls=not choice.disable_parallel_tool_use if choice else None,
        thinking=call.thinking or "off",
    )
    if isinstance(call, MessagesRequest):
        request.max_tokens, request.temperature, request.top_p = call.max_tokens, call.temperature, call.top_p
        request.top_k, request.stop = call.top_k, call.stop_sequences
    return request


def _turns_of(turn: Turn) -> list[schema.ChatMessage]:
    if isinstance(turn.content, str):
        return [schema.ChatMessage(turn.role, turn.content)]
    results = [block for block in turn.content if isinstance(block, ToolResultBlock)]
    calls = [block for block in turn.content if isinstance(block, ToolUseBlock)]
    thoughts = "".join(block.thinking for block in turn.content if isinstance(block, ThinkingBlock))
    parts = [_part(block) for block in turn.content if isinstance(block, TextBlock | ImageBlock)]
    out = []
    for result in results:
        content = result.content
        shown: Any = [_part(block) for block in content] if isinstance(content, list) else content or ""
        out.append(schema.ChatMessage("tool", shown, tool_call_id=result.tool_use_id))
    if parts or calls or thoughts:
        said = schema.ChatMessage(turn.role, parts or None, reasoning_content=thoughts or None)
        if calls:
            said.tool_calls = [schema.ToolCallIn(schema.FunctionCall(c.name, c.input), c.id) for c in calls]
        out.append(said)
    return out


def _part(block: TextBlock | ImageBlock) -> schema.Content:
    if isinstance(block, TextBlock):
        return schema.TextContent(block.text)
    source = block.source
    url = source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
    return schema.ImageContent(schema.MediaSource(url))


@answers
async def create(request: Request) -> Response:
    """Answers a conversation in Anthropic's format."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, MessagesRequest)
    server.check_model(call.model)
    job, _ = await job_of(server, chat_of(call), request_id(request, "msg_"))
    name = call.model or server.model_name
    dialect = Dialect(
        lambda pieces: events(job, name, pieces), lambda whole: answer_of(job, name, whole), b"", _failed
    )
    pieces = server.run(backend, job)
    return await respond(request, server, pieces, dialect, is_stream=bool(call.stream), n=1, headers=headers)


def answer_of(job: Job, name: str, whole: Whole) -> MessagesAnswer:
    answer = whole.choices[0]
    content: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
    if answer.reasoning:
        content.append(ThinkingBlock(answer.reasoning))
    if answer.text:
        content.append(TextBlock(answer.text))
    for tool in answer.tools.values():
        content.append(ToolUseBlock(tool.id, tool.function.name, json.loads(tool.function.arguments or "{}")))
    reason = _REASONS.get(answer.finish_reason, "end_turn")
    return MessagesAnswer(job.id, name, content, reason, _usage(whole.usage))


@answers
async def count(request: Request) -> Response:
    """Tokens of a conversation in Anthropic's format."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, CountRequest)
    server.check_model(call.model)
    job, _ = await job_of(server, chat_of(call), request_id(request, "count-"))
    return json_response(MessagesCount((await backend.count(job)).prompt_tokens), headers)


async def events(job: Job, name: str, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """message_start, then blocks each opened and closed, message_delta, message_stop."""
    opened, index, reason, spent = "", -1, "end_turn", Spent()
    is_begun = False
    async for piece in pieces:
        spent.add(piece)
        if not is_begun:
            is_begun = True
            start = MessagesAnswer(job.id, name, [], None, _usage(spent.total))
            yield event({"type": "message_start", "message": start}, "message_start")
        if piece.finish_reason is not None:
            reason = _REASONS.get(piece.finish_reason, "end_turn")
        for kind, block, delta in _blocks(piece):
            if kind != opened:
                if opened:
                    yield _event("content_block_stop", index=index)
                opened, index = kind, index + 1
                yield _event("content_block_start", index=index, content_block=block)
            yield _event("content_block_delta", index=index, delta=delta)
    if opened:
        yield _event("content_block_stop", index=index)
    ended = {"stop_reason": reason, "stop_sequence": None}
    yield _event("message_delta", delta=ended, usage=msgspec.to_builtins(_usage(spent.total)))
    yield _event("message_stop")


def _blocks(piece: Piece) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(which block, how it opens, what is added) for each thing in a piece."""
    out: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if piece.reasoning:
        opens: dict[str, Any] = {"type": "thinking", "thinking": "", "signature": ""}
        out.append(("thinking", opens, {"type": "thinking_delta", "thinking": piece.reasoning}))
    if piece.text:
        out.append(("text", {"type": "text", "text": ""}, {"type": "text_delta", "text": piece.text}))
    for tool in (tool for tool in piece.tools if not tool.is_broken):
        opens = {"type": "tool_use", "id": tool.id, "name": tool.name, "input": {}}
        delta = {"type": "input_json_delta", "partial_json": tool.arguments}
        out.append((f"tool-{tool.index}", opens, delta))
    return out


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


def _failed(error: BaseException) -> bytes:
    problem = problem_of(error)
    return _event("error", error={"type": problem.type, "message": problem.message})


def _usage(usage: Usage) -> MessagesUsage:
    return MessagesUsage(
        usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens, usage.cached_tokens
    )
