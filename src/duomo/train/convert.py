"""Rows of any spelling to one: OpenAI messages, or ERNIEKit's own. Read back, they are the same rows.

What a spelling cannot say (a tool call in ERNIEKit's text rows, say) is an error with the row's line.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from duomo.errors import TrainingError
from duomo.train.rows import Row, Turn, read_rows

Fields = dict[str, Any]


def convert_file(file: Path, target: Path, kind: str) -> int:
    """Returns the number of rows. TrainingError at the first row that is bad or cannot be said."""
    writers = {"messages": to_messages, "erniekit": to_erniekit}
    if kind not in writers:
        raise TrainingError(f"no format {kind!r} is written; there are {', '.join(writers)}")
    if target.exists() and target.samefile(file):
        raise TrainingError(f"{target} is the file that is read; give another")
    lines = [json.dumps(writers[kind](row), ensure_ascii=False) + "\n" for row in read_rows(file)]
    partial = target.with_name(target.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, target)
    return len(lines)


def to_messages(row: Row) -> Fields:
    """OpenAI messages; an answer not supervised carries `loss: false`, a pair its two answers."""
    if row.rejected is not None:
        return _pair(row)
    fields: Fields = {"messages": [_message(turn) for turn in row.turns]}
    if row.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
            }
            for t in row.tools
        ]
    return fields


def _message(turn: Turn) -> Fields:
    content: Any = turn.text
    if any(piece.kind != "text" for piece in turn.pieces):
        content = [
            {"type": "text", "text": piece.value}
            if piece.kind == "text"
            else {"type": f"{piece.kind}_url", f"{piece.kind}_url": {"url": piece.value}}
            for piece in turn.pieces
        ]
    message: Fields = {"role": turn.role, "content": content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": json.dumps(call.arguments)}}
            for call in turn.tool_calls
        ]
    if turn.role == "assistant" and not turn.is_supervised:
        message["loss"] = False
    return message


def to_erniekit(row: Row) -> Fields:
    """`src`/`tgt` for text, `text_info` where there is a picture, `response`/`sort` for pairs."""
    if row.tools or any(turn.tool_calls or turn.role == "tool" for turn in row.turns):
        raise TrainingError(f"{row.source}: tool calls are written as messages alone")
    if row.media:
        return _vision(row)
    return _pair(row) if row.rejected is not None else _text(row)


def _text(row: Row) -> Fields:
    asked = [turn.text for turn in row.turns if turn.role == "user"]
    answers = [turn for turn in row.turns if turn.role == "assistant"]
    fields: Fields = {"src": asked, "tgt": [_thought(turn) for turn in answers]}
    if not all(turn.is_supervised for turn in answers):
        fields["label"] = [int(turn.is_supervised) for turn in answers]
    return _with_system(row, fields)


def _pair(row: Row) -> Fields:
    if row.media:
        raise TrainingError(f"{row.source}: no spelling here has both a picture and a rejected answer")
    asked = [turn.text for turn in row.turns if turn.role == "user"]
    answers = [_thought(turn) for turn in row.turns if turn.role == "assistant"]
    fields: Fields = {"src": asked, "tgt": answers[:-1], "response": [[answers[-1]], [row.rejected]]}
    return _with_system(row, {**fields, "sort": [1, 0]})


def _vision(row: Row) -> Fields:
    texts: list[Fields] = []
    media: dict[str, list[Fields]] = {"image": [], "video": []}
    has_system = row.turns[0].role == "system"
    for turn in row.turns:
        for piece in turn.pieces:
            if piece.kind != "text":
                media[piece.kind].append({"image_url": piece.value, "matched_text_index": len(texts)})
        tag = "no_mask" if turn.role == "assistant" and turn.is_supervised else "mask"
        if turn.role == "assistant" and not turn.is_supervised:
            raise TrainingError(f"{row.source}: ERNIEKit's picture rows supervise every answer")
        texts.append({"text": _thought(turn), "tag": tag})
        if turn.role == "system":
            texts.append({"text": "ok", "tag": "no_mask"})  # the dummy reply that is_system drops
    fields: Fields = {"text_info": texts} | {f"{kind}_info": found for kind, found in media.items() if found}
    return {**fields, "is_system": 1} if has_system else fields


def _thought(turn: Turn) -> str:
    return f"<think>\n{turn.reasoning}\n</think>\n{turn.text}" if turn.reasoning else turn.text


def _with_system(row: Row, fields: Fields) -> Fields:
    system = "\n".join(turn.text for turn in row.turns if turn.role == "system")
    return {**fields, "system": system} if system else fields
