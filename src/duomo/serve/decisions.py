"""POST /v1/decisions: yes/no, choice and score questions about one conversation, answered from logits.

All questions share the prefill of the conversation, pictures included, and nothing is decoded. The body is a
conversation as in chat, and `questions`, each with a name and a type: predicate, choice or score.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from duomo.serve import convert, schema
from duomo.serve.problems import Problem, invalid
from duomo.serve.server import answers, json_response, request_id, server_of
from duomo.serve.stream import unless_gone


class Predicate(Struct, tag="predicate", tag_field="type"):
    text: Annotated[str, Meta(min_length=1)]
    name: str = ""


class Choice(Struct, tag="choice", tag_field="type"):
    text: Annotated[str, Meta(min_length=1)]
    options: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=2, max_length=64)]
    name: str = ""


class Score(Struct, tag="score", tag_field="type"):
    """A whole number from `low` to `high`; the answer is the mean over their probabilities."""

    text: Annotated[str, Meta(min_length=1)]
    low: Annotated[int, Meta(ge=0, le=100)] = 1
    high: Annotated[int, Meta(ge=0, le=100)] = 5
    name: str = ""


class DecisionsRequest(Struct, kw_only=True):
    messages: list[schema.ChatMessage]
    questions: Annotated[list[Predicate | Choice | Score], Meta(min_length=1, max_length=64)]
    model: str = ""


class DecisionOut(Struct):
    name: str
    answer: str
    probabilities: dict[str, float]
    score: float | None


class Decisions(Struct):
    id: str
    model: str
    decisions: list[DecisionOut]
    object: str = "decisions"


@answers
async def create(request: Request) -> Response:
    """Decides questions about a conversation, pictures included."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, DecisionsRequest)
    server.check_model(call.model)
    chat = schema.ChatRequest(messages=call.messages)
    messages = await convert.messages_of(chat, server.media)
    asked = [(question.text, _options(question)) for question in call.questions]
    server.gate.enter()
    try:
        found = await unless_gone(request, backend.decide(messages, asked))
    finally:
        server.gate.leave(1.0)
    if found is None:
        raise Problem(499, "client_closed", "the client left before the answer")
    out = [
        DecisionOut(question.name or f"question_{index}", *decision)
        for index, (question, decision) in enumerate(zip(call.questions, found, strict=True))
    ]
    name = call.model or server.model_name
    return json_response(Decisions(request_id(request, "decision-"), name, out), headers)


def _options(question: Predicate | Choice | Score) -> tuple[str, ...]:
    if isinstance(question, Predicate):
        return ("Yes", "No")
    if isinstance(question, Choice):
        if len(set(question.options)) != len(question.options):
            raise invalid("a choice has the same option twice", "questions")
        return tuple(question.options)
    if not question.low < question.high <= question.low + 20:
        raise invalid("a score needs low below high, at most 20 apart", "questions")
    return tuple(str(value) for value in range(question.low, question.high + 1))
