"""What `ask` and `chat` share: opening the model in this process, reading media, and printing an answer.

Thinking is printed dimmed, before the answer and apart from it. Ctrl-C while an answer comes ends that answer
and not the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from duomo.engine.request import SamplingParams, ThinkingMode, Usage
from duomo.errors import EngineError, MediaError
from duomo.processing.media import check_kind
from duomo.processing.messages import ImagePart, Message, TextPart, VideoPart
from duomo.serve.backend import Backend, Job
from duomo.serve.options import Options, checked
from duomo.serve.run import load_backend


@dataclass(frozen=True, slots=True)
class Said:
    """One answer as it was printed."""

    text: str
    reasoning: str
    finish_reason: str
    usage: Usage


@dataclass(slots=True)
class Talk:
    """An open model and a console. One event loop for the whole talk."""

    backend: Backend
    console: Console
    loop: asyncio.AbstractEventLoop
    history: list[Message] = field(default_factory=list)

    @classmethod
    def open(cls, model: str | None, engine: str, console: Console, ram: str | None = None) -> Talk:
        """One person asks, so one process and one request at a time; `ram` as in `duomo serve --ram`."""
        loop = asyncio.new_event_loop()
        options = Options(model=model, engine=engine, ram=ram, max_num_seqs=1, engine_process=False)
        backend = loop.run_until_complete(load_backend(checked(options)))
        return cls(backend, console, loop)

    def close(self) -> None:
        self.loop.run_until_complete(self.backend.close())
        self.loop.close()

    def answer(self, params: SamplingParams, shows_thinking: bool = True) -> Said | None:
        """Streams the answer to the history onto the console; None where Ctrl-C ended it."""
        task = self.loop.create_task(self._answer(params, shows_thinking))
        try:
            return self.loop.run_until_complete(task)
        except KeyboardInterrupt:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self.loop.run_until_complete(task)
            self.console.print(Text("\n(stopped)", style="yellow"))
            return None

    async def _answer(self, params: SamplingParams, shows_thinking: bool) -> Said:
        text, reasoning, finish, usage = "", "", "stop", Usage()
        pieces = self.backend.stream(Job(uuid.uuid4().hex, params, tuple(self.history)))
        try:
            async for piece in pieces:
                if piece.reasoning:
                    reasoning += piece.reasoning
                    if shows_thinking:
                        self.console.print(Text(piece.reasoning, style="dim"), end="")
                if piece.text:
                    shown = piece.text if text.strip() else piece.text.lstrip("\n")
                    if not text and reasoning and shows_thinking:
                        self.console.print("\n")
                    text += piece.text
                    self.console.print(Text(shown), end="")
                finish, usage = piece.finish_reason or finish, piece.usage or usage
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        self.console.print()
        if finish == "error":
            raise EngineError("the engine failed on this answer")
        return Said(text, reasoning, finish, usage)


def part_of(path: str, kind: str) -> ImagePart | VideoPart:
    """The encoded picture or video in a file; MediaError in one line if it is none."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
    if kind == "video":
        return VideoPart(check_kind(data, "video"))
    return ImagePart(check_kind(data, "image"))


def user_turn(text: str, media: list[ImagePart | VideoPart]) -> Message:
    return Message("user", (*media, TextPart(text)))


def params_of(
    thinking: bool | None, budget: int | None, max_tokens: int | None, seed: int | None
) -> SamplingParams:
    mode: ThinkingMode = "auto" if thinking is None else ("on" if thinking else "off")
    return SamplingParams(max_tokens=max_tokens, seed=seed, thinking=mode, thinking_budget=budget)
