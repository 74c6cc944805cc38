"""POST /v1/responses: OpenAI's newer dialect over the same road as chat. Nothing is stored between requests.

`previous_response_id` and `background` are refused, since both need a store; the whole conversation is sent
instead. The last event of a stream holds the whole response, as clients expect.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.request import Usage
from duomo.serve import schema
from duomo.serve.backend import Job, Piece
from duomo.serve.chat import job_of
from duomo.serve.items import Items, items_of
from duomo.serve.problems import invalid, problem_of
from duomo.serve.respond import Answer, Dialect, Spent, respond
from duomo.serve.server import answers, request_id, server_of
from duomo.serve.stream import event


class InputText(Struct, tag="input_text", tag_field="type"):
    text: str


class OutputText(Struct, tag="output_text", tag_field="type"):
    text: str
    annotations: list[Any] = []


class InputJson(Struct, tag="input_json", tag_field="type"):
    """Data that is read as text; Decisions has it."""

    data: schema.Object | list[schema.Object]


class Refusal(Struct, tag="refusal", tag_field="type"):
    refusal: str


class InputImage(Struct, tag="input_image", tag_field="type"):
    image_url: str
    detail: Literal["low", "high", "auto", "original"] | None = None


Part = InputText | OutputText | InputImage | InputJson | Refusal


class InputMessage(Struct, tag="message", tag_field="type"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class CallItem(Struct, tag="function_call", tag_field="type"):
    call_id: str
    name: str
    arguments: str


class ResultItem(Struct, tag="function_call_output", tag_field="type"):
    call_id: str
    output: str | list[Part]


class CustomCallItem(Struct, tag="custom_tool_call", tag_field="type"):
    """A call of a tool that takes plain text; to the model it is one with an `input`."""

    call_id: str
    name: str
    input: str


class CustomResultItem(ResultItem, tag="custom_tool_call_output", tag_field="type"):
    pass


class ReasoningItem(Struct, tag="reasoning", tag_field="type"):
    id: str = ""
    summary: list[Any] = []
    content: list[Any] | None = None


class PlainMessage(Struct):
    """A message without `type`, as most people write it."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class FlatTool(Struct):
    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: schema.Object | None = None
    strict: bool | None = None


class FlatChoice(Struct):
    name: str
    type: Literal["function"] = "function"


class FlatSchema(Struct, tag="json_schema", tag_field="type"):
    schema: schema.Object
    name: str = "answer"
    strict: bool | None = None
    description: str | None = None


class TextSettings(Struct):
    format: schema.TextFormat | schema.JsonObjectFormat | FlatSchema | None = None


class ResponsesRequest(Struct, kw_only=True):
    input: str | list[schema.Object]
    model: str = ""
    instructions: str | None = None
    max_output_tokens: schema.Positive | None = None
    temperature: schema.Temperature | None = None
    top_p: schema.Fraction | None = None
    stream: bool | None = None
    reasoning: schema.ReasoningSwitch | None = None
    text: TextSettings | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: schema.Object | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    user: str | None = None


class ResponseOut(Struct):
    id: str
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    output: list[schema.Object]
    parallel_tool_calls: bool
    tool_choice: str
    tools: list[schema.Object]
    usage: schema.Object | None = None
    incomplete_details: schema.Object | None = None
    error: schema.Object | None = None
    instructions: str | None = None
    metadata: schema.Object = {}
    temperature: float | None = None
    top_p: float | None = None
    object: Literal["response"] = "response"


Item = InputMessage | CallItem | ResultItem | CustomCallItem | CustomResultItem | ReasoningItem


def chat_of(call: ResponsesRequest) -> schema.ChatRequest:
    if call.previous_response_id or call.background:
        field = "previous_response_id" if call.previous_response_id else "background"
        raise invalid(
            f"{field} needs a store, and nothing is stored here; send the whole conversation", field
        )
    turns = [schema.ChatMessage("system", call.instructions)] if call.instructions else []
    items = [{"role": "user", "content": call.input}] if isinstance(call.input, str) else call.input
    for index, raw in enumerate(items):
        turns += turns_of(raw, index)
    choice = call.tool_choice
    form: schema.ResponseFormat | None = None
    if call.text and call.text.format is not None:
        asked = call.text.format
        form = (
            schema.JsonSchemaFormat(schema.JsonSchema(asked.schema, asked.name))
            if isinstance(asked, FlatSchema)
            else asked
        )
    return schema.ChatRequest(
        model=call.model,
        messages=turns,
        max_completion_tokens=call.max_output_tokens,
        temperature=call.temperature,
        top_p=call.top_p,
        reasoning=call.reasoning,
        response_format=form,
        tools=[
            schema.ToolSpec(schema.FunctionSpec(tool.name, tool.description, tool.parameters))
            for tool in call.tools or ()
        ]
        or None,
        tool_choice=schema.NamedTool(schema.NamedFunction(choice.name))
        if isinstance(choice, FlatChoice)
        else choice,
        parallel_tool_calls=call.parallel_tool_calls,
    )


def turns_of(raw: schema.Object, index: int) -> list[schema.ChatMessage]:
    """One item of an input as messages of chat. A bad one is a 400 that names its place."""
    try:
        item: Any = msgspec.convert(raw, Item if "type" in raw else PlainMessage)
    except msgspec.ValidationError as error:
        raise invalid(f"input[{index}]: {error}", f"input[{index}]") from error
    if isinstance(item, (CallItem, CustomCallItem)):
        arguments = item.arguments if isinstance(item, CallItem) else {"input": item.input}
        call = schema.ToolCallIn(schema.FunctionCall(item.name, arguments), item.call_id)
        return [schema.ChatMessage("assistant", None, tool_calls=[call])]
    if isinstance(item, ResultItem):
        told = item.output if isinstance(item.output, str) else [part_of(piece) for piece in item.output]
        return [schema.ChatMessage("tool", told, tool_call_id=item.call_id)]
    if isinstance(item, ReasoningItem):
        return []
    if isinstance(item.content, str):
        return [schema.ChatMessage(item.role, item.content)]
    return [schema.ChatMessage(item.role, [part_of(piece) for piece in item.content])]


def part_of(piece: Part) -> schema.Content:
    if isinstance(piece, InputImage):
        return schema.ImageContent(schema.MediaSource(piece.image_url, piece.detail))
    if isinstance(piece, InputJson):
        return schema.TextContent(json.dumps(piece.data, ensure_ascii=False))
    return schema.TextContent(piece.refusal if isinstance(piece, Refusal) else piece.text)


@answers
async def create(request: Request) -> Response:
    """Answers an input in the format of Responses."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, ResponsesRequest)
    server.check_model(call.model)
    job, _ = await job_of(server, chat_of(call), request_id(request, "resp_"))
    call.model = call.model or server.model_name
    dialect = Dialect(
        lambda pieces: events(call, job, pieces),
        lambda whole: response_of(call, job, whole.choices[0], whole.usage),
        b"",
        _failed,
    )
    pieces = server.run(backend, job)
    return await respond(request, server, pieces, dialect, is_stream=bool(call.stream), n=1, headers=headers)


def response_of(call: ResponsesRequest, job: Job, answer: Answer | None, usage: Usage) -> ResponseOut:
    """The response object; an `answer` of None is one that has just begun."""
    choice = call.tool_choice
    out = ResponseOut(
        job.id,
        int(time.time()),
        call.model,
        "in_progress",
        [],
        job.parallel_tool_calls,
        choice if isinstance(choice, str) else "auto",
        [msgspec.to_builtins(tool) for tool in call.tools or ()],
        instructions=call.instructions,
        metadata=call.metadata or {},
        temperature=job.params.temperature,
        top_p=job.params.top_p,
    )
    if answer is None:
        return out
    out.status = "completed"
    if answer.finish_reason == "length":
        out.status, out.incomplete_details = "incomplete", {"reason": "max_output_tokens"}
    out.output = items_of(job.id, answer)
    out.usage = {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    return out


async def events(call: ResponsesRequest, job: Job, pieces: AsyncIterator[Piece]) -> AsyncIterator[bytes]:
    """Named, numbered events; the last one holds the whole response."""
    number = -1
    answer, spent, items = Answer(), Spent(), Items(job.id)

    def told(name: str, /, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": f"response.{name}", "sequence_number": number, **fields}, f"response.{name}")

    begun = response_of(call, job, None, Usage())
    yield told("created", response=begun)
    yield told("in_progress", response=begun)
    async for piece in pieces:
        spent.add(piece)
        answer.add(piece)
        for name, fields in items.add(piece):
            yield told(name, **fields)
    response = response_of(call, job, answer, spent.total)
    response.output = items.in_order(response.output)
    for name, fields in items.close(response.output):
        yield told(name, **fields)
    yield told(response.status, response=response)


def _failed(error: BaseException) -> bytes:
    problem = problem_of(error)
    return event(
        {"type": "error", "code": problem.code, "message": problem.message, "param": problem.param}, "error"
    )
