"""An answer's text taken apart: reasoning, content and tool calls, the same however the text was cut.

One state machine serves whole answers and streams. It knows three dialects, named as people know them:
  ernie-45-vl            reasoning up to the first `</think>`; calls anywhere behind it
  ernie-45-vl-thinking   calls only where nothing but newlines precedes them, as that model was trained
  ernie-x1               also drops the `<response>` tags around the answer (X1, 21B-Thinking)
A thought that is cut off is reasoning, streamed and whole. Newlines next to tags belong to the template and
are dropped. Text that may yet become a tag waits, so no part of a tag is ever shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from duomo.errors import ConfigError
from duomo.processing.messages import ToolCall
from duomo.processing.tools import CLOSE, OPEN, CallPiece, CallReader, join_calls

ParserName = Literal["ernie-45-vl", "ernie-45-vl-thinking", "ernie-x1"]
PARSERS: tuple[ParserName, ...] = ("ernie-45-vl", "ernie-45-vl-thinking", "ernie-x1")
_THINK, _UNTHINK = "<think>", "</think>"
_RESPONSE, _UNRESPONSE = "<response>", "</response>"
TAGS = (OPEN, CLOSE, _RESPONSE, _UNRESPONSE)  # of the answer; a vocabulary may have tokens for them


@dataclass(slots=True)
class AnswerPiece:
    """What became certain; empty fields where nothing did."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def add(self, more: AnswerPiece) -> None:
        self.reasoning += more.reasoning
        self.content += more.content
        self.calls += more.calls


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def parser_named(name: str) -> ParserName:
    """The parser of that name, underscores taken for hyphens; ConfigError if there is none."""
    for known in PARSERS:
        if known == name.strip().replace("_", "-"):
            return known
    raise ConfigError(f"there is no reasoning parser {name!r}; there are {', '.join(PARSERS)}", name=name)


class AnswerParser:
    """`feed` text as it comes, `finish` once. `is_thinking`: the prompt ended in an open thinking block.

    Where the ids are known, `spells_thinking` is False: text that spells `</think>` is text then, and whoever
    sees the token itself calls `end_thinking`.
    """

    def __init__(
        self,
        name: ParserName,
        *,
        is_thinking: bool,
        has_tools: bool = False,
        call_name: str = "call",
        spells_thinking: bool = True,
    ) -> None:
        self._has_tools, self._call_name, self._spells_thinking = has_tools, call_name, spells_thinking
        self._calls_come_first = name == "ernie-45-vl-thinking"
        self._has_response = name == "ernie-x1"
        self._is_thinking = is_thinking
        self._buffer = ""
        self._reasoning = _Trimmer()
        self._content = _Trimmer(is_start=is_thinking or self._has_response)
        self._call: CallReader | None = None
        self._num_calls = 0

    def feed(self, text: str) -> AnswerPiece:
        piece = AnswerPiece()
        self._buffer += text
        while self._step(piece):
            pass
        return piece

    def end_thinking(self) -> AnswerPiece:
        """`</think>` came as a token: what waited was reasoning."""
        piece = AnswerPiece()
        self._show(piece, self._buffer)
        self._buffer, self._is_thinking = "", False
        return piece

    def finish(self) -> AnswerPiece:
        """What waited: it is text now. Every call ends here, whole or broken."""
        piece = AnswerPiece()
        while self._call is not None:
            piece.calls += self._call.finish()
            self._end_call(piece)
            while self._step(piece):
                pass
        if self._is_thinking:
            piece.reasoning += self._reasoning.feed(self._buffer)
        else:
            piece.content += self._content.feed(self._buffer) + self._content.held
        self._buffer = ""
        return piece

    def _step(self, piece: AnswerPiece) -> bool:
        """Deals with the next tag, if there is one whole; says whether there may be more."""
        if self._call is not None:
            text, self._buffer = self._buffer, ""
            piece.calls += self._call.feed(text)
            return self._call.is_done and self._end_call(piece)
        tags = self._tags()
        found = min(((self._buffer.find(tag), tag) for tag in tags if tag in self._buffer), default=None)
        if found is None:
            cut = len(self._buffer) - max((_overlap(self._buffer, tag) for tag in tags), default=0)
            self._show(piece, self._buffer[:cut])
            self._buffer = self._buffer[cut:]
            return False
        place, tag = found
        self._show(piece, self._buffer[:place])
        self._buffer = self._buffer[place + len(tag) :]
        self._meet(piece, tag)
        return True

    def _tags(self) -> list[str]:
        if self._is_thinking:
            return [_THINK, _UNTHINK] if self._spells_thinking else []
        tags = [OPEN] if self._has_tools else []
        return [*tags, _RESPONSE, _UNRESPONSE] if self._has_response else tags

    def _meet(self, piece: AnswerPiece, tag: str) -> None:
        if tag == _THINK and not self._reasoning.is_start:
            self._show(piece, tag)  # only an opening tag at the very start is the template's
        elif tag == _UNTHINK:
            self._is_thinking = False
        elif tag in (_RESPONSE, _UNRESPONSE):
            self._content.cut()
        elif tag == OPEN and self._calls_come_first and self._content.has_shown:
            self._show(piece, tag)
        elif tag == OPEN:
            self._content.cut()
            self._call = CallReader(self._num_calls, f"{self._call_name}_{self._num_calls}")

    def _end_call(self, piece: AnswerPiece) -> bool:
        assert self._call is not None, "a call ends only once"
        call, self._call = self._call, None
        if call.text:
            piece.content += self._content.feed(call.text)
        self._num_calls += 1
        self._buffer = call.rest + self._buffer
        return True

    def _show(self, piece: AnswerPiece, text: str) -> None:
        if self._is_thinking:
            piece.reasoning += self._reasoning.feed(text)
        else:
            piece.content += self._content.feed(text)


def parse_answer(
    text: str, name: ParserName, *, is_thinking: bool, has_tools: bool = False, call_name: str = "call"
) -> ParsedAnswer:
    """A whole answer: the sum of its stream."""
    parser = AnswerParser(name, is_thinking=is_thinking, has_tools=has_tools, call_name=call_name)
    return join_pieces([parser.feed(text), parser.finish()])


def join_pieces(pieces: Iterable[AnswerPiece]) -> ParsedAnswer:
    kept = list(pieces)
    calls = join_calls([call for piece in kept for call in piece.calls])
    return ParsedAnswer("".join(p.reasoning for p in kept), "".join(p.content for p in kept), calls)


class _Trimmer:
    """Drops newlines at the start and next to tags; newlines at the end wait for what follows."""

    def __init__(self, is_start: bool = True) -> None:
        self.is_start, self.has_shown, self.held = is_start, False, ""

    def feed(self, text: str) -> str:
        if self.is_start:
            text = text.lstrip("\n")
        if text:
            self.is_start = False
        text = self.held + text
        shown = text.rstrip("\n")
        self.held = text[len(shown) :]
        self.has_shown = self.has_shown or bool(shown)
        return shown

    def cut(self) -> None:
        """A tag: newlines around it are the template's."""
        self.held, self.is_start = "", True


def _overlap(text: str, tag: str) -> int:
    """How many letters at the end of the text begin the tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
