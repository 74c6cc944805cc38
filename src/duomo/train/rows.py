"""Training rows in every public spelling, as one canonical form; a bad row is named, never dropped.

Read are ERNIEKit's text, preference and picture rows, OpenAI messages, ShareGPT, alpaca and query/response,
told apart by their keys. A row that cannot be right raises TrainingError with its file and line. Pictures
stay paths here: `check_rows` looks whether they exist, training opens them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from duomo.errors import TrainingError
from duomo.processing.messages import Role, Tool, ToolCall

Fields = dict[str, Any]


class Piece(NamedTuple):
    """A text, or the path or address of a picture or video."""

    kind: Literal["text", "image", "video"]
    value: str


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    pieces: tuple[Piece, ...]
    is_supervised: bool = False
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.value for piece in self.pieces if piece.kind == "text")


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation. `rejected` is the answer not preferred, in a preference row.

    `kind` is what an evaluation counts the row under: a key that any format may have beside its own.
    """

    turns: tuple[Turn, ...]
    source: str
    rejected: str | None = None
    tools: tuple[Tool, ...] = ()
    kind: str = ""

    @property
    def media(self) -> list[str]:
        return [p.value for turn in self.turns for p in turn.pieces if p.kind != "text"]


class Problem(NamedTuple):
    """What is wrong with a row, and where."""

    source: str
    message: str


def read_rows(file: Path) -> Iterator[Row]:
    """Rows of a .jsonl file, one a line; TrainingError at the first bad one."""
    for source, line in _lines(file):
        yield parse_row(line, source)


def check_rows(file: Path) -> tuple[list[Row], list[Problem]]:
    """All good rows and all problems; pictures that are paths must exist beside the file."""
    rows, problems = [], []
    for source, line in _lines(file):
        try:
            row = parse_row(line, source)
            _check_media(row, file.parent)
            rows.append(row)
        except TrainingError as error:
            problems.append(Problem(source, error.message.removeprefix(f"{source}: ")))
    return rows, problems


def parse_row(line: str, source: str) -> Row:
    """One line of JSON to a row."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise TrainingError(f"{source}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TrainingError(f"{source}: a row is a JSON object, not {type(fields).__name__}")
    for keys, parse in _FORMATS:
        if all(key in fields for key in keys):
            try:
                row = replace(parse(fields, source), kind=_text(fields.get("kind", ""), "kind"))
            except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
                reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise TrainingError(f"{source}: a row with {'/'.join(keys)}: {reason}") from error
            _check_turns(row)
            return row
    known = "; ".join("/".join(keys) for keys, _ in _FORMATS)
    raise TrainingError(f"{source}: keys {sorted(fields)} are of no known format ({known})")


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{file.name}:{number}", line
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{file} cannot be read: {error}") from error


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a text, not {type(value).__name__}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{what} must be a list, not {type(value).__name__}")
    return value


def _said(role: Role, text: Any, is_supervised: bool = False) -> Turn:
    """A turn of text; `<think>...</think>` before an answer becomes its reasoning."""
    text, reasoning = _text(text, f"the {role}'s text"), None
    if role == "assistant" and text.lstrip().startswith("<think>") and "</think>" in text:
        thought, text = text.lstrip().removeprefix("<think>").split("</think>", 1)
        reasoning, text = thought.strip() or None, text.lstrip("\n")
    return Turn(role, (Piece("text", text),), is_supervised, reasoning)


def _system(fields: Fields) -> list[Turn]:
    return [_said("system", fields["system"])] if fields.get("system") else []


def _ernie_text(fields: Fields, source: str) -> Row:
    asked, answers = _list(fields["src"], "src"), _list(fields["tgt"], "tgt")
    if len(asked) != len(answers):
        raise ValueError(f"src has {len(asked)} texts and tgt {len(answers)}; they must be as many")
    wanted = _list(fields.get("label", [1] * len(answers)), "label")
    if len(wanted) != len(answers) or any(label not in (0, 1) for label in wanted):
        raise ValueError("label must have one 0 or 1 for each answer")
    turns = _system(fields)
    for question, answer, label in zip(asked, answers, wanted, strict=True):
        turns += [_said("user", question), _said("assistant", answer, label == 1)]
    return Row(tuple(turns), source)


def _ernie_preference(fields: Fields, source: str) -> Row:
    asked, answers = _list(fields["src"], "src"), _list(fields.get("tgt", []), "tgt")
    responses, order = _list(fields["response"], "response"), _list(fields["sort"], "sort")
    if len(asked) != len(answers) + 1:
        raise ValueError("tgt must be one text shorter than src")
    if len(responses) != 2 or len(order) != 2 or order[0] == order[1]:
        raise ValueError("response and sort must have two entries, with different ranks in sort")
    turns = _system(fields)
    for question, answer in zip(asked, answers, strict=False):
        turns += [_said("user", question), _said("assistant", answer)]
    chosen, rejected = (0, 1) if order[0] > order[1] else (1, 0)
    texts = [r[0] if isinstance(r, list) else r for r in responses]
    turns += [_said("user", asked[-1]), _said("assistant", texts[chosen], True)]
    return Row(tuple(turns), source, _text(texts[rejected], "the rejected response"))


def _ernie_vision(fields: Fields, source: str) -> Row:
    texts = _list(fields["text_info"], "text_info")
    media: dict[int, list[Piece]] = {}
    for kind in ("image", "video"):
        for item in _list(fields.get(f"{kind}_info", []), f"{kind}_info"):
            index = int(item["matched_text_index"])
            if not 0 <= index < len(texts):
                raise ValueError(f"matched_text_index is {index}; there are {len(texts)} texts")
            media.setdefault(index, []).append(Piece(kind, _text(item["image_url"], "image_url")))
    turns: list[Turn] = []
    for index, item in enumerate(texts):
        if item["tag"] not in ("mask", "no_mask"):
            raise ValueError(f"tag is {item['tag']!r}; it must be mask or no_mask")
        is_answer = item["tag"] == "no_mask"
        if is_answer and index in media:
            raise ValueError(f"a picture is matched to text {index}, which is an answer")
        if fields.get("is_system") and index < 2:
            turns += [_said("system", item["text"])] if index == 0 else []
            continue
        role: Role = "assistant" if is_answer else "tool" if item.get("tool_response") else "user"
        said = _said(role, item["text"], is_answer)
        pieces = (*media.get(index, []), *said.pieces)
        calls = _calls(item, source) if is_answer else ()
        turns.append(Turn(said.role, pieces, said.is_supervised, said.reasoning, calls))
    return Row(tuple(turns), source, tools=_tools(fields))


def _messages(fields: Fields, source: str) -> Row:
    turns = []
    for message in _list(fields["messages"], "messages"):
        role = message["role"]
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"role {role!r} is none of system, user, assistant, tool")
        calls = _calls(message, source)
        content = (message.get("content") or "") if calls else message["content"]
        is_answer = role == "assistant" and message.get("loss", True) is not False
        if isinstance(content, list):
            pieces = tuple(_openai_part(part) for part in content)
            turns.append(Turn(role, pieces, is_answer, tool_calls=calls))
        else:
            said = _said(role, content, is_answer)
            thought = said.reasoning or message.get("reasoning_content")
            turns.append(Turn(role, said.pieces, is_answer, thought, calls))
    return Row(tuple(turns), source, tools=_tools(fields))


def _calls(message: Fields, source: str) -> tuple[ToolCall, ...]:
    """OpenAI's calls (arguments a text of JSON) and ERNIEKit's (arguments an object)."""
    found = []
    for index, item in enumerate(_list(message.get("tool_calls") or [], "tool_calls")):
        call = item.get("function", item)
        arguments = call["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise TypeError("a tool call's arguments must be an object")
        name = _text(call["name"], "a tool call's name")
        found.append(ToolCall(str(item.get("id", f"call-{index}")), name, arguments))
    return tuple(found)


def _tools(fields: Fields) -> tuple[Tool, ...]:
    found = []
    for item in _list(fields.get("tools") or [], "tools"):
        tool = item.get("function", item)
        name = _text(tool["name"], "a tool's name")
        found.append(Tool(name, tool.get("description", ""), tool.get("parameters", {})))
    return tuple(found)


def _openai_part(part: Fields) -> Piece:
    kind = part["type"]
    if kind == "text":
        return Piece("text", _text(part["text"], "text"))
    if kind in ("image_url", "video_url"):
        value = part[kind]
        address = value["url"] if isinstance(value, dict) else value
        return Piece("image" if kind == "image_url" else "video", _text(address, "url"))
    raise ValueError(f"a content part of type {kind!r}; known are text, image_url and video_url")


def _sharegpt(fields: Fields, source: str) -> Row:
    roles: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    roles["system"] = "system"
    turns = _system(fields)
    for said in _list(fields["conversations"], "conversations"):
        if said["from"] not in roles:
            raise ValueError(f"from is {said['from']!r}; known are {', '.join(roles)}")
        role = roles[said["from"]]
        turns.append(_said(role, said["value"], role == "assistant"))
    return _with_placeholders(turns, fields, source)


def _alpaca(fields: Fields, source: str) -> Row:
    turns = _system(fields)
    for question, answer in _list(fields.get("history") or [], "history"):
        turns += [_said("user", question), _said("assistant", answer, True)]
    asked = _text(fields["instruction"], "instruction")
    if fields.get("input"):
        asked += "\n" + _text(fields["input"], "input")
    return Row((*turns, _said("user", asked), _said("assistant", fields["output"], True)), source)


def _preference(fields: Fields, source: str) -> Row:
    turns = (*_system(fields), _said("user", fields["question"]), _said("assistant", fields["chosen"], True))
    return Row(turns, source, _text(fields["rejected"], "rejected"))


def _query(fields: Fields, source: str) -> Row:
    turns = _system(fields)
    for question, answer in _list(fields.get("history") or [], "history"):
        turns += [_said("user", question), _said("assistant", answer, True)]
    turns += [_said("user", fields["query"]), _said("assistant", fields["response"], True)]
    return _with_placeholders(turns, fields, source)


def _with_placeholders(turns: list[Turn], fields: Fields, source: str) -> Row:
    """`<image>` and `<video>` in the users' texts become the row's pictures and videos, in order."""
    waiting = {kind: list(_list(fields.get(f"{kind}s") or [], f"{kind}s")) for kind in ("image", "video")}
    found = []
    for turn in turns:
        pieces: list[Piece] = []
        for piece in turn.pieces if turn.role == "user" else ():
            pieces += _fill(piece.value, waiting)
        found.append(Turn(turn.role, tuple(pieces) or turn.pieces, turn.is_supervised, turn.reasoning))
    for kind, rest in waiting.items():
        if rest:
            raise ValueError(f"{len(rest)} of the {kind}s have no <{kind}> in the text")
    return Row(tuple(found), source)


def _fill(text: str, waiting: dict[str, list[Any]]) -> Iterator[Piece]:
    while text:
        places = {kind: text.find(f"<{kind}>") for kind in waiting}
        present = {kind: place for kind, place in places.items() if place >= 0}
        if not present:
            yield Piece("text", text)
            return
        kind = min(present, key=present.__getitem__)
        before, text = text.split(f"<{kind}>", 1)
        if before:
            yield Piece("text", before)
        if not waiting[kind]:
            raise ValueError(f"the text has more <{kind}> than the row has {kind}s")
        yield Piece("image" if kind == "image" else "video", _text(waiting[kind].pop(0), kind))


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Fields, str], Row]], ...] = (
    (("text_info",), _ernie_vision),
    (("src", "response", "sort"), _ernie_preference),
    (("src", "tgt"), _ernie_text),
    (("messages",), _messages),
    (("conversations",), _sharegpt),
    (("instruction", "output"), _alpaca),
    (("question", "chosen", "rejected"), _preference),
    (("query", "response"), _query),
)


def _check_turns(row: Row) -> None:
    spoken = [turn for turn in row.turns if turn.role != "system"]

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise TrainingError(f"{row.source}: {message}")

    need(bool(spoken), "the row has no turn")
    need(spoken[0].role == "user", f"the first turn is the {spoken[0].role}'s; it must be the user's")
    need(spoken[-1].role == "assistant", f"the last turn is the {spoken[-1].role}'s; it must be an answer")
    for one, other in pairwise(spoken):
        need(
            one.role != other.role or one.role == "tool",
            f"two turns of the {one.role} follow each other; they must alternate",
        )
    need(any(turn.is_supervised for turn in spoken), "no answer is supervised, so nothing can be learnt")
    for turn in spoken:
        said = bool(turn.text.strip()) or bool(turn.tool_calls)
        need(turn.role != "assistant" or said, "an answer is empty")
        full = any(p.value.strip() for p in turn.pieces) or bool(turn.tool_calls)
        need(full, f"a turn of the {turn.role} is empty")
    need(row.rejected is None or bool(row.rejected.strip()), "the rejected answer is empty")
    need(row.rejected is None or row.rejected != spoken[-1].text, "chosen and rejected are the same")


def _check_media(row: Row, folder: Path) -> None:
    for address in row.media:
        if not address.startswith(("http://", "https://", "data:")) and not (folder / address).is_file():
            raise TrainingError(f"{row.source}: no file {address} beside the data")
