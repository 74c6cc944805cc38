"""One tool call as it is spelled out: `{"name": ..., "arguments": {...}}` up to `</tool_call>`.

The arguments go out while they grow, as the text they are. What turns out to be no call (wrong JSON, cut off)
is given back in full as text, with a piece that says the call just announced is none. Braces inside strings
don't count, and neither does an end tag inside a string of the arguments.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from duomo.processing.messages import ToolCall

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEADER = re.compile(r'\s*(\{?)\s*"name"\s*:\s*("(?:[^"\\\n]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAIL = re.compile(r"\s*(\}?)\s*")


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of call `index`: the first has id and name, then come stretches of the arguments' JSON.

    The last has `is_complete`, or `is_broken` where what was announced is no call after all.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    is_complete: bool = False
    is_broken: bool = False


class CallReader:
    """Reads what follows one `<tool_call>`. `feed` until `is_done`; `rest` is then what lies behind it."""

    def __init__(self, index: int, call_id: str) -> None:
        self._index, self._id = index, call_id
        self._raw = OPEN  # everything consumed, to give back
        self._buffer = ""
        self._has_brace: bool | None = None  # known once the header is
        self._arguments = ""
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self._is_tail = False
        self.is_done = False
        self.rest = ""
        self.text = ""  # of a call that was none

    def feed(self, text: str) -> list[CallPiece]:
        self._buffer += text
        pieces: list[CallPiece] = []
        if self._has_brace is None:
            self._read_header(pieces)
        if self._has_brace is not None and not self._is_tail and not self.is_done:
            self._read_arguments(pieces)
        if self._is_tail and not self.is_done:
            self._read_tail(pieces)
        return pieces

    def finish(self) -> list[CallPiece]:
        """At the end of the answer: a call that only lacks its end tag counts."""
        pieces: list[CallPiece] = []
        if self._has_brace is None:
            self._whole(self._buffer, "", pieces)
        elif self._is_tail and self._tail_is_whole(self._buffer):
            pieces.append(CallPiece(self._index, is_complete=True))
        else:
            self._break(pieces)
        self.is_done = True
        return pieces

    def _read_header(self, pieces: list[CallPiece]) -> None:
        place = self._buffer.find(CLOSE)
        body = self._buffer if place < 0 else self._buffer[:place]
        found = _HEADER.match(body)
        name = _loads(found.group(2)) if found else None
        if found and isinstance(name, str) and name:
            self._has_brace = bool(found.group(1))
            self._take(found.end())
            pieces.append(CallPiece(self._index, self._id, name))
        elif place >= 0:
            self.rest = self._buffer[place + len(CLOSE) :]
            self._whole(body, CLOSE, pieces)

    def _whole(self, body: str, tag: str, pieces: list[CallPiece]) -> None:
        """A call in another order of fields, read when all of it is there."""
        fields = _loads(body)
        if fields is None:
            fields = _loads("{" + body + "}")
        name = fields.get("name") if isinstance(fields, dict) else None
        arguments = (
            fields.get("arguments", fields.get("parameters", {})) if isinstance(fields, dict) else None
        )
        if isinstance(arguments, str):
            arguments = _loads(arguments)
        if isinstance(name, str) and name and isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False)
            pieces.append(CallPiece(self._index, self._id, name, text, is_complete=True))
        else:
            self.text = self._raw + body + tag
        self.is_done = True

    def _read_arguments(self, pieces: list[CallPiece]) -> None:
        end = self._scan()
        text = self._take(len(self._buffer) if end is None else end)
        self._arguments += text
        if end is not None and not isinstance(_loads(self._arguments), dict):
            self._break(pieces)
            return
        if text:
            pieces.append(CallPiece(self._index, arguments=text))
        self._is_tail = end is not None

    def _scan(self) -> int | None:
        """Where the object ends in the buffer, or None."""
        for place, letter in enumerate(self._buffer):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = letter == "\\"
                self._in_string = letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None

    def _read_tail(self, pieces: list[CallPiece]) -> None:
        place = self._buffer.find(CLOSE)
        if place >= 0 and self._tail_is_whole(self._buffer[:place]):
            self.rest = self._buffer[place + len(CLOSE) :]
            pieces.append(CallPiece(self._index, is_complete=True))
            self.is_done = True
            return
        found = _TAIL.match(self._buffer)
        assert found is not None, "the pattern matches nothing, too"
        ahead = self._buffer[found.end() :]
        if not CLOSE.startswith(ahead) or (found.group(1) and not self._has_brace):
            self._break(pieces)

    def _tail_is_whole(self, text: str) -> bool:
        found = _TAIL.fullmatch(text)
        return found is not None and bool(found.group(1)) == self._has_brace

    def _break(self, pieces: list[CallPiece]) -> None:
        """No call: its text so far goes back, and what follows is read as any text is."""
        self.text = self._raw
        self.rest = self._buffer
        self.is_done = True
        pieces.append(CallPiece(self._index, is_broken=True))

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        self._raw += taken
        return taken


def join_calls(pieces: list[CallPiece]) -> tuple[ToolCall, ...]:
    """The whole calls that streamed pieces make up; broken and unfinished ones are left out."""
    names: dict[int, tuple[str, str]] = {}
    arguments: dict[int, str] = {}
    complete: list[int] = []
    for piece in pieces:
        if piece.name is not None:
            names[piece.index] = (piece.id or "", piece.name)
        arguments[piece.index] = arguments.get(piece.index, "") + piece.arguments
        if piece.is_complete:
            complete.append(piece.index)
    return tuple(ToolCall(*names[index], json.loads(arguments[index])) for index in complete)


def _loads(text: str) -> Any:
    """JSON, or None; numbers that JSON has not (NaN, Infinity) are none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)
