"""A backend that speaks fixed text, for trying clients and for timing the server itself. It reads nothing.

`duomo serve --engine scripted` starts it. A token is one piece of the script; thinking, budgets, stops,
max_tokens, n, tools and usage obey the contract of the real thing, so that clients meet every shape.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from duomo.engine.questions import Question
from duomo.engine.request import ExpertTrace, Usage
from duomo.errors import EngineError, PromptTooLong
from duomo.processing.messages import ImagePart, Message, VideoPart
from duomo.serve.backend import Count, Job, ModelFacts, Piece, TokenInfo, ToolPiece

_TOKEN = re.compile(r"\s?\S+|\s+")
_IMAGE_TOKENS, _VIDEO_TOKENS = 64, 256
_NUM_LAYERS, _NUM_EXPERTS, _NUM_CHOSEN = 6, 16, 2


class Scripted:
    """Speaks `answer`, after `thoughts` where thinking is not off; `delay_s` before each token."""

    def __init__(
        self,
        answer: str = "This is a script, 这是一个脚本, and no model has read the question.",
        thoughts: str = "Somebody asks something. There is nothing to think about.",
        *,
        delay_s: float = 0.0,
        max_model_len: int = 4096,
    ) -> None:
        self.answer, self.thoughts, self.delay_s = answer, thoughts, delay_s
        self._facts = ModelFacts("scripted", max_model_len, num_experts=(_NUM_EXPERTS, _NUM_EXPERTS))
        self._hurried: dict[str, bool] = {}  # running requests, and whether they were told to answer now
        self._cancelled: set[str] = set()
        self.adapters: dict[str, Path] = {}
        self.is_alive = True

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def stream(self, job: Job) -> AsyncIterator[Piece]:
        return self._speak(job)

    async def count(self, job: Job) -> Count:
        return self._count(job)

    async def decide(
        self, messages: tuple[Message, ...], questions: Sequence[Question]
    ) -> list[dict[str, float]]:
        """Always the first option, with nine tenths."""
        self.questions = list(questions)
        shares = [(one.options, 0.1 / (len(one.options) - 1)) for one in questions]
        return [{o: 0.9 if o == options[0] else rest for o in options} for options, rest in shares]

    def answer_now(self, job_id: str) -> bool:
        if job_id in self._hurried:
            self._hurried[job_id] = True
        return job_id in self._hurried

    def cancel(self, job_id: str) -> bool:
        if job_id in self._hurried:
            self._cancelled.add(job_id)
        return job_id in self._hurried

    def load_adapter(self, name: str, folder: Path) -> None:
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i & 255 for i in ids).decode(errors="replace")

    def gauges(self) -> Mapping[str, float]:
        return {"running": len(self._hurried), "waiting": 0, "kv_usage": len(self._hurried) / 256}

    def expect_picture(self) -> None: ...

    def residency(self) -> Mapping[str, Mapping[str, float | None]]:
        return {}

    def die(self) -> None:
        """As if the engine were killed: every stream ends with an error."""
        self.is_alive = False

    async def close(self) -> None:
        self.is_alive = False

    async def _speak(self, job: Job) -> AsyncIterator[Piece]:
        count = self._count(job)
        room = self._facts.max_model_len - count.prompt_tokens
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {count.prompt_tokens} tokens and the context {self._facts.max_model_len}",
                needed=count.prompt_tokens,
                available=self._facts.max_model_len,
            )
        self._hurried[job.id] = False
        try:
            limit = min(job.params.max_tokens or room, room)
            for index in range(job.params.n):
                async for piece in self._choice(job, index, limit, count):
                    yield piece
        finally:
            self._hurried.pop(job.id, None)
            self._cancelled.discard(job.id)

    async def _choice(self, job: Job, index: int, limit: int, count: Count) -> AsyncIterator[Piece]:
        spent = reasoned = 0

        def so_far() -> Usage:
            return Usage(count.prompt_tokens, spent, reasoned, 0, count.image_tokens, count.video_tokens)

        def trace() -> ExpertTrace | None:
            """What was computed since the last token: the prompt at first, then a token a step."""
            if not job.params.return_experts:
                return None
            if spent == 1:
                return _trace(0, count.prompt_tokens, count.image_tokens + count.video_tokens)
            return _trace(count.prompt_tokens + spent - 2, 1)

        if job.params.thinking != "off" and job.prompt is None:
            budget = job.params.thinking_budget
            for token in _tokens(self.thoughts):
                if spent >= limit or (budget is not None and reasoned >= budget):
                    break
                if self._hurried[job.id] or job.id in self._cancelled:
                    break
                await self._tick()
                spent, reasoned = spent + 1, reasoned + 1
                yield Piece(index, reasoning=token, token_ids=(spent,), usage=so_far(), experts=trace())
        script = self._call(job) if _must_call(job) else [Piece(index, text=t) for t in self._cut(job)]
        finish = "tool_calls" if _must_call(job) else "stop"
        for piece in script:
            if spent >= limit or job.id in self._cancelled:
                finish = "length" if spent >= limit else "abort"
                break
            await self._tick()
            spent += 1
            info = (
                TokenInfo(piece.text, -0.5, piece.text.encode(), ((piece.text, -0.5, piece.text.encode()),)),
            )
            logprobs = info if job.params.logprobs is not None and piece.text else ()
            yield replace(
                piece, index=index, token_ids=(spent,), logprobs=logprobs, usage=so_far(), experts=trace()
            )
        mode = "off" if not reasoned else "on"
        yield Piece(index, finish_reason=finish, usage=so_far(), thinking=mode)  # type: ignore[arg-type]

    def _call(self, job: Job) -> list[Piece]:
        named = [tool for tool in job.tools if tool.name == job.tool_choice] or list(job.tools[:1])
        first = Piece(tools=(ToolPiece(0, "call_0", named[0].name),))
        return [
            first,
            *(Piece(tools=(ToolPiece(0, arguments=part),)) for part in ('{"text"', ': "脚本"', "}")),
        ]

    def _cut(self, job: Job) -> list[str]:
        text = self.answer
        ends = [text.index(stop) for stop in job.params.stop if stop in text]
        return _tokens(text[: min(ends)] if ends else text)

    async def _tick(self) -> None:
        await asyncio.sleep(self.delay_s)
        if not self.is_alive:
            raise EngineError("the engine has stopped; the server says at /health whether it comes back")

    def _count(self, job: Job) -> Count:
        if job.prompt is not None:
            return Count(len(job.prompt) if isinstance(job.prompt, tuple) else len(_tokens(job.prompt)))
        images, videos = _media(job.messages, ImagePart), _media(job.messages, VideoPart)
        words = sum(4 + len(_tokens(message.text)) for message in job.messages)
        pictures, films = images * _IMAGE_TOKENS, videos * _VIDEO_TOKENS
        each = (_IMAGE_TOKENS,) * images + (_VIDEO_TOKENS,) * videos
        return Count(words + pictures + films, pictures, films, each)


def _must_call(job: Job) -> bool:
    return bool(job.tools) and job.tool_choice not in ("auto", "none")


def _media(messages: Sequence[Message], kind: type) -> int:
    return sum(isinstance(part, kind) for message in messages for part in message.parts)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _trace(start: int, num_tokens: int, num_media: int = 0) -> ExpertTrace:
    """Experts as a model might choose them; the first layer has none, the first `num_media` tokens see."""
    ids = bytearray()
    for token in range(start, start + num_tokens):
        for layer in range(_NUM_LAYERS):
            first = (token * 5 + layer * 3) % _NUM_EXPERTS
            ids += bytes((first, (first + 1 + token % 7) % _NUM_EXPERTS) if layer else (255, 255))
    is_vision = bytes(start + place < num_media for place in range(num_tokens))
    return ExpertTrace(start, _NUM_LAYERS, _NUM_CHOSEN, bytes(ids), is_vision)
