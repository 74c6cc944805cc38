"""From an answer's ids to what people read: reasoning, text and tool calls, streamed and whole alike.

`</think>` is known by its id, so text that merely spells it is text. Newlines at the edges of the reasoning
and before the answer belong to the template and are dropped. Whole is the sum of the stream by construction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from duomo.engine.stops import StopMatcher, overlap
from duomo.processing.detokenize import Detokenizer
from duomo.processing.messages import ToolCall
from duomo.processing.tokenizer import Tokenizer

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(slots=True)
class Piece:
    reasoning: str = ""
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


class AnswerText:
    """`add` ids as they come, `finish` at the end; the pieces put together are the whole answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        is_thinking: bool,
        stops: Sequence[str] = (),
        has_tools: bool = False,
        name: str = "call",
    ) -> None:
        self._tokenizer = tokenizer
        self._think_end = tokenizer.find_special("</think>")
        tags = [tokenizer.find_special(tag) for tag in (_OPEN, _CLOSE)] if has_tools else []
        self._keep = frozenset(tag for tag in tags if tag is not None)
        self._decoder = Detokenizer(tokenizer, keep=self._keep)
        self._is_thinking = is_thinking and self._think_end is not None
        self._thoughts = _Trimmed(trims_end=True)
        self._words = _Trimmed(trims_end=False, is_active=self._is_thinking)
        self._stops = StopMatcher(stops)
        self._tools = _ToolCalls(name) if has_tools else None

    def add(self, ids: Sequence[int]) -> Piece:
        piece = Piece()
        for token in ids:
            if self._is_thinking and token == self._think_end:
                piece.reasoning += self._thoughts.feed(self._decoder.finish())
                self._decoder = Detokenizer(self._tokenizer, keep=self._keep)
                self._is_thinking = False
            elif self._is_thinking:
                piece.reasoning += self._thoughts.feed(self._decoder.add(token))
            else:
                self._say(piece, self._decoder.add(token))
        return piece

    def finish(self) -> Piece:
        piece = Piece()
        if self._is_thinking:
            piece.reasoning += self._thoughts.feed(self._decoder.finish())
            return piece
        self._say(piece, self._decoder.finish())
        rest = self._stops.finish()
        if self._tools is None:
            piece.text += rest
        else:
            self._tools.feed(rest, piece)
            self._tools.finish(piece)
        return piece

    def _say(self, piece: Piece, text: str) -> None:
        shown = self._stops.feed(self._words.feed(text)) if text else ""
        if self._tools is None:
            piece.text += shown
        else:
            self._tools.feed(shown, piece)


class _Trimmed:
    """Drops newlines at the beginning and, if asked, at the end."""

    def __init__(self, trims_end: bool, is_active: bool = True) -> None:
        self._trims_end, self._is_start, self._held = trims_end, is_active, ""

    def feed(self, text: str) -> str:
        if self._is_start:
            text = text.lstrip("\n")
            self._is_start = not text
        if not self._trims_end:
            return text
        text = self._held + text
        shown = text.rstrip("\n")
        self._held = text[len(shown) :]
        return shown


class _ToolCalls:
    """Finds `<tool_call>{...}</tool_call>`; a block that is no call is given back as text."""

    def __init__(self, name: str) -> None:
        self._name, self._count, self._waiting, self._inside = name, 0, "", False

    def feed(self, text: str, piece: Piece) -> None:
        self._waiting += text
        while True:
            tag = _CLOSE if self._inside else _OPEN
            place = self._waiting.find(tag)
            if place < 0:
                break
            before, self._waiting = self._waiting[:place], self._waiting[place + len(tag) :]
            if self._inside:
                self._call(before, piece)
            else:
                piece.text += before.rstrip("\n") if before.strip("\n") == "" else before
            self._inside = not self._inside
        if not self._inside:
            held = overlap(self._waiting, _OPEN)
            cut = len(self._waiting) - held
            shown, self._waiting = self._waiting[:cut], self._waiting[cut:]
            piece.text += shown.lstrip("\n") if self._count else shown

    def finish(self, piece: Piece) -> None:
        if self._inside:
            self._call(self._waiting, piece)
        else:
            piece.text += self._waiting
        self._waiting, self._inside = "", False

    def _call(self, body: str, piece: Piece) -> None:
        try:
            fields: Any = json.loads(body)
            arguments = fields.get("arguments", fields.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            call = ToolCall(f"{self._name}-{self._count}", str(fields["name"]), dict(arguments))
        except (ValueError, KeyError, TypeError, AttributeError):
            piece.text += _OPEN + body
            return
        self._count += 1
        piece.tool_calls.append(call)
