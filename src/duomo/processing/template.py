"""A conversation to a prompt, in the words ERNIE-4.5 was trained on (spec 5.2), written out by us.

Roles are plain words (`User: `, `Assistant: `), media and thinking stand between control tokens. Control
tokens are put in as ids; everything people or tools say goes through `Tokenizer.encode`, which never makes
one. History is encoded as one text with what precedes it; the answer to come begins a text of its own, here
as in training, so both see the same ids. User and tool messages that follow each other form one user turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal

from duomo.errors import ConfigError, MediaError, PromptTooLong, TemplateError
from duomo.processing.images import load_image
from duomo.processing.messages import Conversation, ImagePart, Message, Part, TextPart, Tool, VideoPart
from duomo.processing.prompt import Media, MediaSpan, Prompt
from duomo.processing.tokenizer import Tokenizer

IGNORE = -100
VIDEO_LIMITS = ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")
_THINKING_SYSTEM = (
    "You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework."
)


class TemplateDialect(str, Enum):
    ERNIE_VL = "ernie_vl"
    ERNIE_VL_THINKING = "ernie_vl_thinking"  # a system line of its own, thinking opened on a new line
    ERNIE_TEXT = "ernie_text"  # 21B and 0.3B: no pictures, and no empty thinking block when it is off


def load_media(part: ImagePart | VideoPart) -> Media:
    """Decodes a part; the default of `load`, in whose place a cache may stand."""
    if isinstance(part, ImagePart):
        return load_image(part)
    from duomo.processing.video import load_video

    return load_video(part)


LoadMedia = Callable[[ImagePart | VideoPart], Media]


def loader_of(folder: Path, load_media: LoadMedia = load_media) -> LoadMedia:
    """`load_media` within the sizes that a checkpoint's preprocessor_config.json states, if it does.

    `min_pixels` and `max_pixels` are of pictures; of videos there may be `video`, with any of VideoPart's
    fields. What a request asks for goes first. ConfigError if the file is not readable.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return load_media
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        low, high = fields.get("min_pixels"), fields.get("max_pixels")
        video = {name: fields.get("video", {}).get(name) for name in VIDEO_LIMITS}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path.name} is not readable JSON: {error}") from error

    def load(part: ImagePart | VideoPart) -> Media:
        if isinstance(part, VideoPart):  # frames have limits of their own
            asked = {name: getattr(part, name) for name in VIDEO_LIMITS}
            return load_media(replace(part, **{n: video[n] if v is None else v for n, v in asked.items()}))
        return load_media(
            replace(part, min_pixels=part.min_pixels or low, max_pixels=part.max_pixels or high)
        )

    return load


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation with its answers. `labels[i]` is the id wanted after `prompt.ids[i]`, or IGNORE."""

    prompt: Prompt
    labels: list[int]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`build_prompt` for one checkpoint: its tokenizer, its dialect, and where media come from."""

    tokenizer: Tokenizer
    dialect: TemplateDialect = TemplateDialect.ERNIE_VL
    load: LoadMedia = load_media

    def render(
        self,
        conversation: Conversation,
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
    ) -> Prompt:
        return build_prompt(
            conversation,
            self.tokenizer,
            thinking=thinking,
            tools=tools,
            dialect=self.dialect,
            max_tokens=max_tokens,
            load=self.load,
        )


def build_prompt(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    thinking: bool,
    tools: Sequence[Tool] = (),
    dialect: TemplateDialect = TemplateDialect.ERNIE_VL,
    max_tokens: int | None = None,
    load: LoadMedia = load_media,
) -> Prompt:
    """Everything up to where the answer begins.

    `max_tokens` bounds the prompt. Raises TemplateError (an impossible conversation), MediaError (naming the
    picture or video) or PromptTooLong.
    """
    _check(conversation, dialect)
    if conversation[-1].role not in ("user", "tool"):
        raise TemplateError(
            f"the last message is the {conversation[-1].role}'s; it must be a user's or a tool's"
        )
    writer = _Writer(tokenizer, load)
    _head(writer, conversation, tools, dialect)
    _turns(writer, [message for message in conversation if message.role != "system"])
    _open_answer(writer, thinking, dialect)
    prompt = writer.prompt()
    if max_tokens is not None and len(prompt.ids) > max_tokens:
        raise PromptTooLong(
            f"the prompt has {len(prompt.ids)} tokens; at most {max_tokens} are possible",
            needed=len(prompt.ids),
            available=max_tokens,
        )
    return prompt


def render_with_labels(
    conversation: Conversation,
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Tool] = (),
    dialect: TemplateDialect = TemplateDialect.ERNIE_VL,
    supervise: Literal["last", "all"] | Collection[int] = "last",
    load: LoadMedia = load_media,
) -> Rendering:
    """A whole conversation for training: its ids are those of `build_prompt`, then the last answer's.

    Supervised are the answers (the last, all, or those at these places of the conversation) with their
    reasoning, calls and end. The context token at an answer's end is `<|end_of_sentence|>`, its label `</s>`
    (spec 3.6).
    """
    _check(conversation, dialect)
    if conversation[-1].role != "assistant":
        raise TemplateError("a training conversation must end with the assistant's message")
    last = conversation[-1]
    wanted = _supervised(conversation, supervise)
    is_wanted = len(conversation) - 1 in wanted
    writer = _Writer(tokenizer, load)
    _head(writer, conversation, tools, dialect)
    spoken = [(index, m) for index, m in enumerate(conversation[:-1]) if m.role != "system"]
    _turns(
        writer, [m for _, m in spoken], {place for place, (index, _) in enumerate(spoken) if index in wanted}
    )
    thinks = last.reasoning is not None
    _open_answer(writer, thinks, dialect)
    writer.flush()
    if thinks:
        opening = "" if dialect is TemplateDialect.ERNIE_VL_THINKING else "\n"
        writer.text(f"{opening}{last.reasoning}\n", is_answer=is_wanted)
        writer.control("</think>", is_answer=is_wanted)
        writer.text("\n", is_answer=is_wanted)
    _answer(writer, last, is_wanted)
    return Rendering(writer.prompt(), writer.labels())


def _supervised(
    conversation: Conversation, supervise: Literal["last", "all"] | Collection[int]
) -> Collection[int]:
    if supervise == "last":
        return {len(conversation) - 1}
    if supervise == "all":
        return {index for index, message in enumerate(conversation) if message.role == "assistant"}
    assert not isinstance(supervise, str), "last, all, or places in the conversation"
    return supervise


def _check(conversation: Conversation, dialect: TemplateDialect) -> None:
    if not any(message.role != "system" for message in conversation):
        raise TemplateError("the conversation has no message of a user; give at least one")
    calls: set[str] = set()
    has_called = started = False
    for index, message in enumerate(conversation):
        where = f"message {index + 1}"
        if message.role == "system" and started:
            raise TemplateError(f"{where} is a system message; it must come before all others")
        started = started or message.role != "system"
        has_media = any(not isinstance(part, TextPart) for part in message.parts)
        if has_media and message.role not in ("user", "tool"):
            raise TemplateError(
                f"{where} has a picture or video; only a user's or a tool's message may have one"
            )
        if has_media and dialect is TemplateDialect.ERNIE_TEXT:
            raise TemplateError(f"{where} has a picture or video, and this model reads text alone")
        if message.role != "assistant" and (message.tool_calls or message.reasoning is not None):
            raise TemplateError(f"{where} has reasoning or tool calls; only the assistant's may have them")
        if message.role == "tool" and not has_called:
            raise TemplateError(f"{where} is a tool's result, and no tool was called before it")
        if message.role == "tool" and message.tool_call_id not in (None, *calls):
            raise TemplateError(f"{where} answers a tool call that was never made")
        calls |= {call.id for call in message.tool_calls}
        has_called = has_called or bool(message.tool_calls)


def _head(
    writer: _Writer, conversation: Conversation, tools: Sequence[Tool], dialect: TemplateDialect
) -> None:
    writer.control("<|begin_of_sentence|>")
    if tools:
        writer.text("\n")
        writer.control("<tool_list>")
        writer.text(tool_list(tools))
        writer.control("</tool_list>")
        writer.text("\n")
    system = "\n".join(message.text for message in conversation if message.role == "system")
    if not system and dialect is TemplateDialect.ERNIE_VL_THINKING:
        system = _THINKING_SYSTEM
    if system:
        writer.text(system + "\n")


def tool_list(tools: Sequence[Tool]) -> str:
    """What stands between `<tool_list>` and its end."""
    return f"\n{json.dumps([_declared(tool) for tool in tools], ensure_ascii=False)}\n"


def _declared(tool: Tool) -> dict[str, object]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _turns(writer: _Writer, messages: Sequence[Message], supervised: Collection[int] = ()) -> None:
    previous = None
    for place, message in enumerate(messages):
        if message.role == "assistant":
            is_supervised = place in supervised
            writer.text("\nAssistant: ")
            if message.reasoning is not None:
                writer.control("<think>")
                writer.text(f"\n{message.reasoning}\n", is_answer=is_supervised)
                writer.control("</think>", is_answer=is_supervised)
                writer.text("\n", is_answer=is_supervised)
            _answer(writer, message, is_supervised)
        else:
            if previous in (None, "assistant"):
                writer.text("User: ")
            elif previous == message.role == "user":
                writer.text("\n")
            _asked(writer, message)
        previous = message.role


def _asked(writer: _Writer, message: Message) -> None:
    if message.role == "tool":
        writer.text("\n")
        writer.control("<tool_output>")
        writer.text("\n")
    for part in message.parts:
        writer.part(part)
    if message.role == "tool":
        writer.text("\n")
        writer.control("</tool_output>")
        writer.text("\n")


def _answer(writer: _Writer, message: Message, is_supervised: bool) -> None:
    writer.text(message.text, is_answer=is_supervised)
    if message.text and message.tool_calls:
        writer.text("\n", is_answer=is_supervised)
    for call in message.tool_calls:
        fields = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        writer.control("<tool_call>", is_answer=is_supervised)
        writer.text(f"\n{fields}\n", is_answer=is_supervised)
        writer.control("</tool_call>", is_answer=is_supervised)
        writer.text("\n", is_answer=is_supervised)
    writer.control("<|end_of_sentence|>", is_answer=is_supervised)


def _open_answer(writer: _Writer, thinking: bool, dialect: TemplateDialect) -> None:
    writer.text("\nAssistant: ")
    if dialect is TemplateDialect.ERNIE_TEXT and not thinking:
        return
    if dialect is TemplateDialect.ERNIE_VL_THINKING:
        writer.text("\n")
    writer.control("<think>")
    if not thinking:
        writer.text("\n\n")
        writer.control("</think>")
        writer.text("\n\n")
    elif dialect is TemplateDialect.ERNIE_VL_THINKING:
        writer.text("\n")


class _Writer:
    """Ids as they grow, with the text not encoded yet, and which ids belong to a supervised answer."""

    def __init__(self, tokenizer: Tokenizer, load: LoadMedia) -> None:
        self._tokenizer, self._load = tokenizer, load
        self._ids: list[int] = []
        self._is_answer: list[bool] = []
        self._pending, self._pending_answer = "", ""
        self._media: list[Media] = []
        self._spans: list[MediaSpan] = []
        self._count = {"image": 0, "video": 0}

    def text(self, text: str, *, is_answer: bool = False) -> None:
        assert not self._pending_answer or is_answer, "an answer ends with a control token"
        if is_answer:
            self._pending_answer += text
        else:
            self._pending += text

    def control(self, name: str, *, is_answer: bool = False) -> None:
        """A control token by name; spelled out where the vocabulary has none (tools, in older ones)."""
        found = self._tokenizer.find_special(name)
        if found is None and name.startswith("<|"):
            found = self._tokenizer.special_id(name)  # raises: without these there is no prompt
        if found is None:
            self.text(name, is_answer=is_answer)
        else:
            self.flush()
            self._put([found], is_answer)

    def part(self, part: Part) -> None:
        if isinstance(part, TextPart):
            self.text(part.text)
            return
        kind: Literal["image", "video"] = "image" if isinstance(part, ImagePart) else "video"
        self._count[kind] += 1
        name = f"{'Picture' if kind == 'image' else 'Video'} {self._count[kind]}"
        try:
            media = self._load(part)
        except MediaError as error:
            raise type(error)(f"{name}: {error.message}", **error.facts) from error
        self.text(f"{name}:")
        self.control(f"<|{kind.upper()}_START|>")
        self._spans.append(MediaSpan(len(self._ids), media.grid))
        self._media.append(media)
        placeholder = self._tokenizer.special_id("<|IMAGE_PLACEHOLDER|>")  # of videos too, as Baidu has it
        self._put([placeholder] * media.grid.num_tokens, False)
        self.control(f"<|{kind.upper()}_END|>")

    def flush(self) -> None:
        """Encodes what is pending as one text. Ids that the answer changed or added are the answer's."""
        before = self._tokenizer.encode(self._pending)
        if not self._pending_answer:
            self._put(before, False)
        else:
            ids = self._tokenizer.encode(self._pending + self._pending_answer)
            same = 0
            while same < min(len(before), len(ids)) and before[same] == ids[same]:
                same += 1
            self._put(ids[:same], False)
            self._put(ids[same:], True)
        self._pending = self._pending_answer = ""

    def _put(self, ids: list[int], is_answer: bool) -> None:
        self._ids += ids
        self._is_answer += [is_answer] * len(ids)

    def prompt(self) -> Prompt:
        self.flush()
        return Prompt(self._ids, tuple(self._media), tuple(self._spans))

    def labels(self) -> list[int]:
        end, eos = self._tokenizer.special_id("<|end_of_sentence|>"), self._tokenizer.special_id("</s>")
        wanted = [
            (eos if token == end else token) if is_answer else IGNORE
            for token, is_answer in zip(self._ids, self._is_answer, strict=True)
        ]
        return [*wanted[1:], IGNORE]
