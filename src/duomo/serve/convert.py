"""From OpenAI's messages and fields to duomo's: parts with their bytes, tools, sampling and constraints.

Media are fetched here, side by side, before a request takes its turn. `detail` becomes a pixel budget: low is
512 by 512, high and original leave the checkpoint's own bound. Two constraints in one request are refused.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from duomo.engine.request import Constraint, SamplingParams
from duomo.errors import MediaTooLarge
from duomo.processing.media import FetchRules, Kind, fetch
from duomo.processing.messages import ImagePart, Message, Part, TextPart, Tool, ToolCall, VideoPart
from duomo.serve import schema
from duomo.serve.problems import invalid
from duomo.serve.thinking import Thinking

_LOW_DETAIL_PIXELS = 512 * 512


@dataclass(frozen=True, slots=True)
class MediaRules:
    """How media may come, how many, and how they are resized when the request says nothing."""

    fetch: FetchRules
    most: dict[str, int]
    defaults: schema.MediaKwargs
    total_bytes: int = 128 << 20  # of one request
    on_arrival: Callable[[], None] = lambda: None  # told of media before they are fetched


async def messages_of(request: schema.ChatRequest, rules: MediaRules) -> tuple[Message, ...]:
    """The conversation with every medium fetched. At least one message, and the last not the assistant's."""
    if not request.messages:
        raise invalid("messages is empty; give at least one", "messages")
    _check_limits(request.messages, rules.most)
    if any(_has_media(message) for message in request.messages):
        rules.on_arrival()
    kwargs = _merged(rules.defaults, request.mm_processor_kwargs)
    turns = [_turn(message, index, kwargs, rules.fetch) for index, message in enumerate(request.messages)]
    messages = tuple(await asyncio.gather(*turns))
    total = sum(len(part.data) for m in messages for part in m.parts if not isinstance(part, TextPart))
    if total > rules.total_bytes:
        most_mb = rules.total_bytes / (1 << 20)
        raise MediaTooLarge(
            f"the request's media are over {most_mb:g} MB together; send fewer or smaller ones"
        )
    return messages


def _has_media(message: schema.ChatMessage) -> bool:
    parts = message.content if isinstance(message.content, list) else []
    return any(isinstance(part, (schema.ImageContent, schema.VideoContent)) for part in parts)


def _check_limits(messages: list[schema.ChatMessage], most: dict[str, int]) -> None:
    parts = [part for m in messages if isinstance(m.content, list) for part in m.content]
    for kind, what in (("image", schema.ImageContent), ("video", schema.VideoContent)):
        number = sum(isinstance(part, what) for part in parts)
        if number > most[kind]:
            raise invalid(
                f"the request has {number} {kind}s; at most {most[kind]} are allowed",
                "messages",
                "too_many_media",
            )


async def _turn(
    message: schema.ChatMessage, index: int, kwargs: schema.MediaKwargs, rules: FetchRules
) -> Message:
    where = f"messages[{index}]"
    content = message.content
    if isinstance(content, str):
        parts: list[Part] = [TextPart(content)]
    else:
        parts = list(await asyncio.gather(*(_part(piece, kwargs, rules) for piece in content or [])))
    if message.role == "tool" and not message.tool_call_id:
        raise invalid(f"{where} is a tool's result and names no call", f"{where}.tool_call_id")
    if content is None and not message.tool_calls and message.role != "assistant":
        raise invalid(f"{where} has no content", f"{where}.content")
    return Message(
        "system" if message.role == "developer" else message.role,
        tuple(parts),
        reasoning=message.reasoning_content or message.reasoning,
        tool_calls=tuple(_call(call, where) for call in message.tool_calls or ()),
        tool_call_id=message.tool_call_id,
    )


async def _part(piece: schema.Content, kwargs: schema.MediaKwargs, rules: FetchRules) -> Part:
    if isinstance(piece, schema.TextContent):
        return TextPart(piece.text)
    if isinstance(piece, schema.RefusalContent):
        return TextPart(piece.refusal)
    if isinstance(piece, schema.ImageContent):
        source = _source(piece.image_url)
        low = _LOW_DETAIL_PIXELS if source.detail == "low" else None
        return ImagePart(
            await fetch(source.url, "image", rules),
            source.min_pixels or kwargs.image_min_pixels or kwargs.min_pixels,
            source.max_pixels or low or kwargs.image_max_pixels or kwargs.max_pixels,
        )
    source = _source(piece.video_url)
    return VideoPart(
        await fetch(source.url, "video", rules),
        fps=source.fps or kwargs.video_fps,
        min_frames=source.min_frames or kwargs.video_min_frames,
        max_frames=source.max_frames or kwargs.video_max_frames,
        target_frames=source.target_frames or kwargs.video_target_frames,
        min_pixels=source.min_pixels or kwargs.video_min_pixels or kwargs.min_pixels,
        max_pixels=source.max_pixels or kwargs.video_max_pixels or kwargs.max_pixels,
    )


def _source(source: schema.MediaSource | str) -> schema.MediaSource:
    return schema.MediaSource(source) if isinstance(source, str) else source


async def fetch_part(url: str, kind: Kind, rules: FetchRules) -> Part:
    data = await fetch(url, kind, rules)
    return ImagePart(data) if kind == "image" else VideoPart(data)


def _merged(defaults: schema.MediaKwargs, given: schema.MediaKwargs | None) -> schema.MediaKwargs:
    if given is None:
        return defaults
    values = {**msgspec.structs.asdict(defaults)}
    values.update({k: v for k, v in msgspec.structs.asdict(given).items() if v is not None})
    return schema.MediaKwargs(**values)


def _call(call: schema.ToolCallIn, where: str) -> ToolCall:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise invalid("arguments of a tool call are not JSON", f"{where}.tool_calls") from error
    if not isinstance(arguments, dict):
        raise invalid("arguments of a tool call must be a JSON object", f"{where}.tool_calls")
    return ToolCall(call.id, call.function.name, arguments)


def tools_of(request: schema.ChatRequest) -> tuple[tuple[Tool, ...], str]:
    """The tools and the choice: auto, none, required, or a tool's name."""
    tools = tuple(
        Tool(t.function.name, t.function.description or "", t.function.parameters or {})
        for t in request.tools or ()
    )
    choice = request.tool_choice or "auto"
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise invalid("two tools have the same name", "tools")
    if isinstance(choice, schema.NamedTool):
        if choice.function.name not in names:
            raise invalid(f"tool_choice names {choice.function.name!r}, which is not in tools", "tool_choice")
        return tools, choice.function.name
    if choice == "required" and not tools:
        raise invalid("tool_choice is required and there are no tools", "tool_choice")
    return tools, choice


def constraint_of(request: schema.ChatRequest | schema.CompletionRequest) -> Constraint | None:
    """The one constraint of a request, whatever field it came in."""
    found: list[tuple[str, Constraint]] = []
    form = request.response_format
    if isinstance(form, schema.JsonObjectFormat):
        found.append(("response_format", Constraint("json_object")))
    elif isinstance(form, schema.JsonSchemaFormat):
        found.append(("response_format", _json(form.json_schema.schema)))
    outputs = request.structured_outputs or schema.StructuredOutputs()
    schemas: list[tuple[str, Any]] = [
        ("structured_outputs.json", outputs.json),
        ("guided_json", request.guided_json),
    ]
    found += [(name, _json(value)) for name, value in schemas if value is not None]
    if outputs.json_object:
        found.append(("structured_outputs.json_object", Constraint("json_object")))
    for name, regex in (("structured_outputs.regex", outputs.regex), ("guided_regex", request.guided_regex)):
        if regex is not None:
            found.append((name, Constraint("regex", regex)))
    for name, text in (
        ("structured_outputs.grammar", outputs.grammar),
        ("guided_grammar", request.guided_grammar),
    ):
        if text is not None:
            found.append((name, Constraint("grammar", text)))
    for name, words in (
        ("structured_outputs.choice", outputs.choice),
        ("guided_choice", request.guided_choice),
    ):
        if words is not None:
            if not words or not all(words):
                raise invalid(f"{name} needs at least one choice, and none empty", name)
            found.append((name, Constraint("choice", json.dumps(words, ensure_ascii=False))))
    if len(found) > 1:
        raise invalid(f"{found[0][0]} and {found[1][0]} both constrain the answer; give one", found[1][0])
    return found[0][1] if found else None


def _json(value: Any) -> Constraint:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise invalid("the JSON schema is not JSON", "guided_json") from error
    return Constraint("json_schema", json.dumps(value, ensure_ascii=False))


def params_of(
    request: schema.ChatRequest | schema.CompletionRequest,
    thinking: Thinking,
    seed: int | None,
    max_tokens: int | None,
    logprobs: int | None,
    defaults: Mapping[str, float],
) -> SamplingParams:
    """Sampling as asked, the checkpoint's `defaults` and then ours elsewhere.

    A ConfigError of SamplingParams becomes a 400 as it is.
    """
    wanted: dict[str, Any] = {
        name: getattr(request, name)
        for name in (
            "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "n", "min_tokens", "ignore_eos", "prompt_logprobs",
        )
    }  # fmt: skip
    if request.top_k is not None:
        wanted["top_k"] = max(0, request.top_k)
    given = {**defaults, **{name: value for name, value in wanted.items() if value is not None}}
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        seed=request.seed if request.seed is not None else seed,
        stop=tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        bad_words=tuple(request.bad_words or ()),
        logit_bias=_bias(request.logit_bias or {}),
        logprobs=logprobs,
        thinking=thinking.mode,
        thinking_budget=thinking.budget,
        constraint=constraint_of(request),
        return_experts=isinstance(request, schema.ChatRequest) and request.return_experts is True,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(name): value for name, value in given.items()}
    except ValueError as error:
        raise invalid("logit_bias must map token ids to numbers", "logit_bias") from error
