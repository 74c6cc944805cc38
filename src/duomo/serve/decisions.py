"""POST /v1/decisions: predicate, choice and score questions about one input, answered from logits.

The shape is that of OpenAI's Decisions (its Python and Node clients speak it); pictures are read in the input
and in a question's instructions. All questions share the prefill of the input and nothing is decoded: each
option's probability is read after the question. An option of several tokens is scored whole. The value of a
score's level is its place, from 0.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from duomo.engine.questions import Question
from duomo.engine.request import SamplingParams
from duomo.serve import convert, schema
from duomo.serve.backend import Job
from duomo.serve.problems import Problem, invalid
from duomo.serve.responses import InputImage, InputJson, InputText, part_of, turns_of
from duomo.serve.server import answers, json_response, request_id, server_of
from duomo.serve.stream import unless_gone

Word = Annotated[str, Meta(min_length=1, max_length=512)]


Instructions = (
    Annotated[str, Meta(min_length=1)]
    | Annotated[list[InputText | InputImage | InputJson], Meta(min_length=1)]
)


class Predicate(Struct, tag="predicate", tag_field="type"):
    instructions: Instructions
    name: str | None = None


class ChoiceOption(Struct):
    value: Word | bool
    description: str | None = None


class Choice(Struct, tag="choice", tag_field="type"):
    instructions: Instructions
    choices: Annotated[list[ChoiceOption], Meta(min_length=2, max_length=255)]
    name: str | None = None


class Level(Struct):
    label: Word
    description: str | None = None


class Score(Struct, tag="score", tag_field="type"):
    """Levels from the least to the most."""

    instructions: Instructions
    levels: Annotated[list[Level], Meta(min_length=2, max_length=64)]
    name: str | None = None


Asked = Predicate | Choice | Score


class DecisionsRequest(Struct, kw_only=True):
    input: str | list[schema.Object]
    questions: Annotated[list[Asked], Meta(min_length=1, max_length=400)]
    model: str = ""
    prompt_cache_key: str | None = None
    prompt_cache_options: schema.Object | None = None
    safety_identifier: str | None = None


class PredicateAnswer(Struct, tag="predicate", tag_field="type"):
    name: str | None
    probability: float


class ChoiceProbability(Struct):
    value: str | bool
    probability: float


class ChoiceAnswer(Struct, tag="choice", tag_field="type"):
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class LevelProbability(Struct):
    label: str
    value: int
    probability: float


class ScoreAnswer(Struct, tag="score", tag_field="type"):
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


class InputDetails(Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    image_tokens: int = 0


class OutputDetails(Struct):
    reasoning_tokens: int = 0


class DecisionUsage(Struct):
    """The input counts once; questions and options are not counted, and nothing is made."""

    input_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int = 0
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)


class Decisions(Struct):
    id: str
    model: str
    answers: list[PredicateAnswer | ChoiceAnswer | ScoreAnswer]
    usage: DecisionUsage
    object: Literal["decision"] = "decision"


@answers
async def create(request: Request) -> Response:
    """Decides questions about an input, pictures included."""
    server = server_of(request)
    backend = server.ready()
    call, headers = await server.read(request, DecisionsRequest)
    server.check_model(call.model)
    if isinstance(call.input, str):
        turns = [schema.ChatMessage("user", call.input)]
    else:
        turns = [turn for index, item in enumerate(call.input) for turn in turns_of(item, index)]
    words = [_words(question) for question in call.questions]
    said = [_instructions(question) for question in call.questions]
    leads = [schema.ChatMessage("user", lead) for lead, _ in said]
    fetched = await convert.messages_of(schema.ChatRequest(messages=[*turns, *leads]), server.media)
    messages = fetched[: len(turns)]
    asked = [
        Question(_text(question, text), options, lead.parts)
        for question, (_, text), options, lead in zip(
            call.questions, said, words, fetched[len(turns) :], strict=True
        )
    ]
    identity = request_id(request, "decision-")
    server.gate.enter()
    try:
        count = await backend.count(Job(identity, _NOTHING_ASKED, messages=messages))
        found = await unless_gone(request, backend.decide(messages, asked))
    finally:
        server.gate.leave(1.0)
    if found is None:
        raise Problem(499, "client_closed", "the client left before the answer")
    out = [
        _answer(question, [probabilities[word] for word in options])
        for question, options, probabilities in zip(call.questions, words, found, strict=True)
    ]
    tokens = count.prompt_tokens
    usage = DecisionUsage(tokens, tokens, InputDetails(image_tokens=count.image_tokens))
    return json_response(Decisions(identity, call.model or server.model_name, out, usage), headers)


_NOTHING_ASKED = SamplingParams(thinking="off")


def _answer(question: Asked, shares: list[float]) -> PredicateAnswer | ChoiceAnswer | ScoreAnswer:
    if isinstance(question, Predicate):
        return PredicateAnswer(question.name, shares[0])
    best = max(shares)
    if isinstance(question, Choice):
        values = [choice.value for choice in question.choices]
        each = [ChoiceProbability(value, share) for value, share in zip(values, shares, strict=True)]
        return ChoiceAnswer(question.name, values[shares.index(best)], best, each)
    levels = [
        LevelProbability(level.label, place, share)
        for place, (level, share) in enumerate(zip(question.levels, shares, strict=True))
    ]
    score = sum(level.value * level.probability for level in levels)
    return ScoreAnswer(question.name, score, best, levels)


def _words(question: Asked) -> tuple[str, ...]:
    """What is scored for each option. Two that read the same could not be told apart."""
    if isinstance(question, Predicate):
        return ("Yes", "No")
    words = _labels(question)
    if len(set(words)) != len(words):
        raise invalid(f"two options of a {type(question).__name__.lower()} read the same", "questions")
    return words


def _labels(question: Choice | Score) -> tuple[str, ...]:
    if isinstance(question, Score):
        return tuple(level.label for level in question.levels)
    values = [choice.value for choice in question.choices]
    return tuple(value if isinstance(value, str) else str(value).lower() for value in values)


def _instructions(question: Asked) -> tuple[list[schema.Content], str]:
    """What comes before the question's last text (its pictures, and texts before them), and that text."""
    said = question.instructions
    if isinstance(said, str):
        return [], said
    parts = [part_of(part) for part in said]
    after = next((i for i in range(len(parts), 0, -1) if not isinstance(parts[i - 1], schema.TextContent)), 0)
    texts = [part.text for part in parts[after:] if isinstance(part, schema.TextContent)]
    return parts[:after], "\n".join(texts)


def _text(question: Asked, text: str) -> str:
    """The question as the model reads it: the instructions, then the options with what they mean."""
    if isinstance(question, Predicate):
        return f"{text}\nAnswer Yes or No."
    options: Any = question.choices if isinstance(question, Choice) else question.levels
    lines = [
        f"- {word}: {option.description}" if option.description else f"- {word}"
        for word, option in zip(_labels(question), options, strict=True)
    ]
    return "\n".join([text, "Answer with one of:", *lines])
