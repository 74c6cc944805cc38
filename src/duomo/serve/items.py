"""The output items of Responses (reasoning, a message, calls of tools), whole and as the events of a stream.

An item opens with its first delta and closes, in order, at the end. What was announced as a call and turned
out to be none closes at once as incomplete and is left out of the response; its text comes as text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

from duomo.serve.backend import Piece
from duomo.serve.respond import Answer
from duomo.serve.schema import FunctionOut, Object, ToolCallOut

Told: TypeAlias = tuple[str, dict[str, Any]]  # an event's name after "response.", and its fields


def items_of(job_id: str, answer: Answer) -> list[Object]:
    """Reasoning, message and calls; a message even when nothing was said."""
    items: list[Object] = []
    if answer.reasoning:
        items.append(_reasoning(job_id, [_thought(answer.reasoning)]))
    if answer.text or not answer.tools:
        items.append(_message(job_id, "completed", [_text(answer.text)]))
    items += [_call(job_id, index, call) for index, call in sorted(answer.tools.items())]
    return items


class Items:
    """Those of one stream; `output_index` is an item's place among all that were opened."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._places: dict[str, int] = {}  # of the items opened so far, by id
        self._calls: dict[int, Object] = {}  # as they were opened

    def add(self, piece: Piece) -> Iterator[Told]:
        """The events of a piece."""
        if piece.reasoning:
            empty = _reasoning(self._job_id, [])
            yield from self._open(empty, _thought(""))
            yield "reasoning_text.delta", {**self._part(empty), "delta": piece.reasoning}
        if piece.text:
            empty = _message(self._job_id, "in_progress", [])
            yield from self._open(empty, _text(""))
            yield "output_text.delta", {**self._part(empty), "delta": piece.text, "logprobs": []}
        for tool in piece.tools:
            if tool.is_broken:
                if tool.index in self._calls:
                    item = self._calls.pop(tool.index)
                    place, item = self._places[item["id"]], {**item, "status": "incomplete"}
                    yield "output_item.done", {"output_index": place, "item": item}
                continue
            if tool.index not in self._calls:
                opened = ToolCallOut(tool.id or "", FunctionOut(tool.name or "", ""))
                self._calls[tool.index] = _call(self._job_id, tool.index, opened, "in_progress")
            item = self._calls[tool.index]
            yield from self._open(item)
            if tool.arguments:
                yield "function_call_arguments.delta", {**self._at(item), "delta": tool.arguments}

    def in_order(self, output: list[Object]) -> list[Object]:
        """As they were opened; one that was not comes last."""
        return sorted(output, key=lambda item: self._places.get(item["id"], len(self._places)))

    def close(self, output: list[Object]) -> Iterator[Told]:
        """The events that end each item, and those that open one no delta did."""
        for item in output:
            if item["id"] not in self._places:  # a message in which nothing was said
                yield from self._open({**item, "status": "in_progress", "content": []}, item["content"][0])
            if item["type"] == "reasoning":
                (part,) = item["content"]
                yield "reasoning_text.done", {**self._part(item), "text": part["text"]}
                yield "content_part.done", {**self._part(item), "part": part}
            elif item["type"] == "message":
                (part,) = item["content"]
                yield "output_text.done", {**self._part(item), "text": part["text"], "logprobs": []}
                yield "content_part.done", {**self._part(item), "part": part}
            else:
                told = {"arguments": item["arguments"], "name": item["name"]}
                yield "function_call_arguments.done", {**self._at(item), **told}
            yield "output_item.done", {"output_index": self._places[item["id"]], "item": item}

    def _open(self, item: Object, part: Object | None = None) -> Iterator[Told]:
        if item["id"] not in self._places:
            self._places[item["id"]] = len(self._places)
            yield "output_item.added", {"output_index": self._places[item["id"]], "item": item}
            if part is not None:
                yield "content_part.added", {**self._part(item), "part": part}

    def _at(self, item: Object) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": self._places[item["id"]]}

    def _part(self, item: Object) -> dict[str, Any]:
        return {**self._at(item), "content_index": 0}


def _reasoning(job_id: str, content: list[Object]) -> Object:
    return {"id": f"rs_{job_id}", "type": "reasoning", "summary": [], "content": content}


def _message(job_id: str, status: str, content: list[Object]) -> Object:
    return {
        "id": f"msg_{job_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _thought(text: str) -> Object:
    return {"type": "reasoning_text", "text": text}


def _text(text: str) -> Object:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(job_id: str, index: int, call: ToolCallOut, status: str = "completed") -> Object:
    return {
        "id": f"fc_{job_id}_{index}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.function.name,
        "arguments": call.function.arguments,
        "status": status,
    }
