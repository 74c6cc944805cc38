"""What the server asks of whatever answers: one protocol, so that every test of the wire needs no weights.

`duomo.llm.LLM` is the real one; `serve.scripted` is a small one that speaks fixed text, to try clients with.
A `Job` is one request in duomo's own terms; pieces of its answers come back as `Piece`s, in order within
each choice. Closing the iterator cancels the request, at once and for good.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from duomo.engine.questions import Question
from duomo.engine.request import ExpertTrace, FinishReason, SamplingParams, ThinkingMode, Usage
from duomo.processing.messages import Message, Tool


@dataclass(frozen=True, slots=True)
class Job:
    """Messages for the chat template, or a prompt as text or ids. `tool_choice` may name a tool."""

    id: str
    params: SamplingParams
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    priority: int = 0
    cache_salt: str = ""
    adapter: str = ""  # a loaded one, or "" for the model itself


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """A piece of a call: the first has the id and the name, every one a stretch of the arguments' JSON.

    `is_broken`: what was announced turned out to be no call; its text follows as text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    is_broken: bool = False


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token with its log-probability and the best alternatives; text may hold half a character as bytes."""

    text: str
    logprob: float
    data: bytes
    top: tuple[tuple[str, float, bytes], ...] = ()


class Piece(Struct, frozen=True):
    """What came next in choice `index`; `usage` is the choice's so far. The last has `finish_reason`.

    There is one for every token: a Struct is made in a tenth of a frozen dataclass's time.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tools: tuple[ToolPiece, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    thinking: ThinkingMode | None = None
    experts: ExpertTrace | None = None


@dataclass(frozen=True, slots=True)
class Count:
    """Tokens of a prompt, without running it; `media_tokens` one number a picture or video, in order."""

    prompt_tokens: int
    image_tokens: int = 0
    video_tokens: int = 0
    media_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    name: str
    max_model_len: int
    modalities: tuple[str, ...] = ("text", "image", "video")
    plan: Mapping[str, str] = field(default_factory=dict)  # printed at start: what was decided, and from what
    sampling: Mapping[str, float] = field(default_factory=dict)  # the checkpoint's generation_config.json
    num_experts: tuple[int, int] | None = None  # a layer's text and vision experts; None: a dense model


class Backend(Protocol):
    """Errors are of `duomo.errors`; those of the prompt are raised before the first piece."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def is_alive(self) -> bool: ...

    def stream(self, job: Job) -> AsyncIterator[Piece]: ...

    async def count(self, job: Job) -> Count: ...

    async def decide(
        self, messages: tuple[Message, ...], questions: Sequence[Question]
    ) -> list[dict[str, float]]:
        """For each question the probability of every option."""
        ...

    def answer_now(self, job_id: str) -> bool:
        """Closes the thinking of a running request; False if it does not run or does not think."""
        ...

    def cancel(self, job_id: str) -> bool:
        """Ends a request wherever it is; its stream ends with finish_reason "abort". False if none."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Makes a LoRA adapter usable as `Job.adapter`; may take a while. Error if it does not fit."""
        ...

    def unload_adapter(self, name: str) -> None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def gauges(self) -> Mapping[str, float]:
        """Numbers of this moment: running, waiting, kv_usage (0 to 1) and counters of caches."""
        ...

    def expect_picture(self) -> None:
        """A picture is on its way: what reading it needs may be made ready. Returns at once."""
        ...

    def residency(self) -> Mapping[str, Mapping[str, float | None]]:
        """By part of the model: bytes, resident_bytes, cached_bytes, idle_s. Empty where all is memory."""
        ...

    async def close(self) -> None: ...
