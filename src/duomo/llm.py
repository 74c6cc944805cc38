"""The facade: open a checkpoint, chat, generate, stream, score, close.

Joins processing (messages to ids, ids to text) with the engine. Every call may come from any thread; the
`a`-twins are for asyncio. Nothing here computes: the engine's thread does, one step for all requests.
A stream that is not read to its end cancels its request when it is closed.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duomo.engine.governor import needs_thinking
from duomo.engine.mailbox import Box
from duomo.engine.questions import Decision, Question, decide
from duomo.engine.reading import Asked, Reader, whole
from duomo.engine.request import (
    Completion,
    Delta,
    MediaBlob,
    Output,
    Request,
    SamplingParams,
    ThinkingMode,
    TokenLogprob,
    Usage,
)
from duomo.errors import CheckpointError, ConfigError, EngineError, PromptError
from duomo.processing.messages import Message, TextPart, Tool
from duomo.processing.prompt import Prompt
from duomo.processing.reasoning import ParserName, parser_named
from duomo.processing.template import ChatTemplate, LoadMedia, TemplateDialect, load_media, loader_of
from duomo.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from duomo.checkpoints.residency import Residency
    from duomo.engine.engine import Engine
    from duomo.engine.process import EngineProcess
    from duomo.engine.scripted import Script
    from duomo.model.config import ModelConfig

__all__ = ["LLM", "Decision", "Question"]
ASSETS = Path(__file__).parent / "assets"
_PARSERS: dict[TemplateDialect, ParserName] = {
    TemplateDialect.ERNIE_VL: "ernie-45-vl",
    TemplateDialect.ERNIE_VL_THINKING: "ernie-45-vl-thinking",
    TemplateDialect.ERNIE_TEXT: "ernie-x1",
}
_names = itertools.count()


class LLM:
    """One model and its engine. Use `LLM.open`, and `close` (or a `with`) at the end."""

    def __init__(
        self,
        engine: Engine | EngineProcess,
        tokenizer: Tokenizer,
        config: ModelConfig | None,
        name: str,
        dialect: TemplateDialect | None = None,
        load: LoadMedia = load_media,
        parser: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.config, self.name = engine, tokenizer, config, name
        is_text = config is not None and not config.is_multimodal
        dialect = dialect or (TemplateDialect.ERNIE_TEXT if is_text else TemplateDialect.ERNIE_VL)
        self.sampling = dict(sampling or {})
        self.defaults = SamplingParams(**self.sampling)
        """Where nothing is asked: as the checkpoint's generation_config.json says, then as we do."""
        self._raw_defaults = replace(self.defaults, thinking="off")
        self._template = ChatTemplate(tokenizer, dialect, load)
        self._parser: ParserName = _PARSERS[dialect] if parser is None else parser_named(parser)
        engine.start()

    @classmethod
    def open(
        cls,
        path: str | Path | None = None,
        *,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        kv_bytes: int | None = None,
        page_size: int = 16,
        max_model_tokens: int | None = None,
        max_sequences: int | None = None,
        max_step_tokens: int = 512,
        has_prefix_cache: bool = True,
        num_drafts: int = 0,
        feature_folder: str | Path | None = None,
        name: str | None = None,
        dialect: TemplateDialect | None = None,
        parser: str | None = None,
        load: LoadMedia = load_media,
        own_process: bool = False,
        weights_idle_s: float = 300.0,
        weights_cap_bytes: int | None = None,
        ram_bytes: int | None = None,
    ) -> LLM:
        """Opens a checkpoint folder; None opens the embedded model.

        dtype "auto" computes in fp32 below a billion parameters and in the file's dtype above; kv_dtype is
        float32, bfloat16, int8 or auto (bfloat16 from a billion parameters on, else as the model computes).
        `num_drafts` > 0 turns speculation on;
        `parser` names the reader of answers (`processing.reasoning`), else the dialect's own does it.
        `load` decodes pictures and videos (`processing.decoding` does it in other processes).
        `own_process` runs the engine in a process of its own, whose death ends every open request.
        Packed weights are read when needed: those for pictures leave memory `weights_idle_s` after the last
        one, and above `weights_cap_bytes` the experts chosen least do. `ram_bytes` is all that duomo may use:
        pages, requests and a cap on weights follow from it; without it pages follow from what is available.
        CheckpointError or ConfigError if the folder holds no model that duomo runs.
        """
        from duomo.checkpoints import load_config
        from duomo.checkpoints.generation import load_sampling

        folder = embedded_folder() if path is None else Path(path)
        tokenizer = Tokenizer.load(folder) if folder.is_dir() else _no_folder(folder)
        config, sampling = load_config(folder), load_sampling(folder)
        options: dict[str, Any] = {
            "dtype": dtype,
            "kv_dtype": kv_dtype,
            "kv_bytes": kv_bytes,
            "page_size": page_size,
            "max_model_tokens": max_model_tokens,
            "max_sequences": max_sequences,
            "max_step_tokens": max_step_tokens,
            "has_prefix_cache": has_prefix_cache,
            "num_drafts": num_drafts,
            "feature_folder": str(feature_folder) if feature_folder else None,
            "weights_idle_s": weights_idle_s,
            "weights_cap_bytes": weights_cap_bytes,
            "ram_bytes": ram_bytes,
        }
        engine: Engine | EngineProcess
        if own_process:
            from duomo.engine.process import EngineProcess

            engine = EngineProcess(folder, tokenizer, options)
        else:
            from duomo.engine.opening import open_engine

            engine, _ = open_engine(folder, tokenizer, **options)
        named = name or config.name or folder.name
        return cls(engine, tokenizer, config, named, dialect, loader_of(folder, load), parser, sampling)

    @classmethod
    def scripted(cls, tokenizer: Tokenizer, script: Script, *, name: str = "scripted", **options: Any) -> LLM:
        """A model that says what the script says; for tests of what stands above the engine."""
        from duomo.engine.engine import build_engine
        from duomo.engine.scripted import ScriptedRunner
        from duomo.engine.vocabulary import Vocabulary

        runner = ScriptedRunner(script, tokenizer.vocab_size, options.pop("step_seconds", 0.0))
        parser = options.pop("parser", None)
        options = {"num_pages": 512, "page_size": 16} | options
        engine = build_engine(runner, Vocabulary.of(tokenizer), **options)
        return cls(engine, tokenizer, None, name, parser=parser)

    @property
    def residency(self) -> Residency | None:
        """The packed weights of an engine in this process; `residency_report` works everywhere."""
        from duomo.engine.engine import Engine

        return self.engine.residency if isinstance(self.engine, Engine) else None

    # ---- whole answers ----

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        **asked: Any,
    ) -> Completion:
        """The answer to a conversation. `asked`: request_id, priority, salt, adapter."""
        params = params or self.defaults
        return self._whole(self.stream(messages, params, tools, **asked), params, messages, tools)

    def generate(
        self, prompt: str | Sequence[int] | Prompt, params: SamplingParams | None = None, **asked: Any
    ) -> Completion:
        """Continues a text or ids as they are, without a template and without thinking."""
        params = params or self._raw_defaults
        return self._whole(self.stream_generate(prompt, params, **asked), params, (), ())

    async def achat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        **asked: Any,
    ) -> Completion:
        params = params or self.defaults
        deltas = [delta async for delta in self.astream(messages, params, tools, **asked)]
        return self._whole(iter(deltas), params, messages, tools)

    async def agenerate(
        self, prompt: str | Sequence[int] | Prompt, params: SamplingParams | None = None, **asked: Any
    ) -> Completion:
        params = params or self._raw_defaults
        deltas = [delta async for delta in self.astream_generate(prompt, params, **asked)]
        return self._whole(iter(deltas), params, (), ())

    # ---- streams ----

    def stream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        **asked: Any,
    ) -> Iterator[Delta]:
        """Pieces of the answer as they come; the last of each choice has a finish reason and usage."""
        return self._stream(self._ask(messages, params or self.defaults, tools, **asked))

    def stream_generate(
        self, prompt: str | Sequence[int] | Prompt, params: SamplingParams | None = None, **asked: Any
    ) -> Iterator[Delta]:
        return self._stream(self._ask_raw(prompt, params or self._raw_defaults, **asked))

    async def astream(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        tools: Sequence[Tool] = (),
        **asked: Any,
    ) -> AsyncIterator[Delta]:
        """`stream` for asyncio. Pictures are decoded off the event loop; closing it cancels the request."""
        ready = await asyncio.to_thread(self._ask, messages, params or self.defaults, tools, **asked)
        async for delta in self._astream(ready):
            yield delta

    async def astream_generate(
        self, prompt: str | Sequence[int] | Prompt, params: SamplingParams | None = None, **asked: Any
    ) -> AsyncIterator[Delta]:
        async for delta in self._astream(self._ask_raw(prompt, params or self._raw_defaults, **asked)):
            yield delta

    # ---- control and questions ----

    def cancel(self, request_id: str) -> None:
        """Ends a request, and every choice of it, before the next step."""
        for name in self._choices(request_id):
            self.engine.cancel(name)

    def answer_now(self, request_id: str) -> None:
        """Closes the thinking of a running request."""
        for name in self._choices(request_id):
            self.engine.answer_now(name)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = (), **asked: Any) -> Usage:
        """The usage a conversation's prompt will report, pictures included; nothing is computed."""
        asked_params = SamplingParams(thinking=asked.pop("thinking", "auto"))
        ready = self._ask(messages, asked_params, tools)[0]
        return Usage(
            prompt_tokens=len(ready.request.ids),
            image_tokens=ready.image_tokens,
            video_tokens=ready.video_tokens,
        )

    def decide(self, messages: Sequence[Message], questions: Sequence[Question]) -> list[Decision]:
        """Answers questions about one conversation from logits: one shared prefill, no decoding.

        The conversation ends with the user's turn (a picture, say); each question is added to that turn.
        """
        if not messages or messages[-1].role != "user":
            raise PromptError("questions need a conversation that ends with the user's turn")
        waiting = []
        for question in questions:
            if len(question.options) < 2:
                raise ConfigError("a question needs at least two options")
            last = messages[-1]
            turn = replace(last, parts=(*last.parts, *question.lead, TextPart(question.text)))
            prompt, _ = self._prompt([*messages[:-1], turn], (), is_thinking=False)
            waiting.append([self._score(prompt, option) for option in question.options])
        return [
            decide(question, [wait() for wait in waits])
            for question, waits in zip(questions, waiting, strict=True)
        ]

    def stats(self) -> dict[str, float]:
        """Gauges and counters of the engine; names are those of `Engine.stats`."""
        return self.engine.stats()

    def expect_picture(self) -> None:
        """Says that a picture is on its way: the disk reads what it needs meanwhile. Returns at once.

        Every call with pictures does so by itself before it decodes them.
        """
        self.engine.expect_picture()

    def reset_caches(self) -> None:
        """Forgets prefixes and pictures in memory."""
        self.engine.reset_caches()

    def residency_report(self) -> dict[str, dict[str, float | None]]:
        """By part of the model: bytes, resident_bytes, cached_bytes, idle_s; {} where weights are plain."""
        return self.engine.residency_report()

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Loads a LoRA in PEFT's files. Requests choose it by `adapter=name` and share no prefix with others.

        ConfigError if the name is taken, CheckpointError if the files are no adapter of this model.
        """
        self.engine.load_adapter(name, Path(path))

    def unload_adapter(self, name: str) -> None:
        """New requests may no longer choose it; those under way keep it to their end."""
        self.engine.unload_adapter(name)

    def adapters(self) -> list[str]:
        """Names that a request may choose."""
        return self.engine.adapters()

    @property
    def max_model_tokens(self) -> int:
        return self.engine.max_model_tokens

    @property
    def is_alive(self) -> bool:
        return self.engine.is_alive

    @property
    def has_vision(self) -> bool:
        return self.config is not None and self.config.is_multimodal

    def close(self) -> None:
        """Open streams end with finish reason abort."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside ----

    def _ask(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        tools: Sequence[Tool],
        **asked: Any,
    ) -> list[Asked]:
        if any(not isinstance(part, TextPart) for message in messages for part in message.parts):
            self.expect_picture()
        is_thinking = self._thinks(messages, params, tools)
        prompt, is_open = self._prompt(messages, tools, is_thinking)
        return self._ready(prompt, params, is_open, self._parser, bool(tools), **asked)

    def _ask_raw(
        self, prompt: str | Sequence[int] | Prompt, params: SamplingParams, **asked: Any
    ) -> list[Asked]:
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt)
        ready = prompt if isinstance(prompt, Prompt) else Prompt(list(prompt))
        return self._ready(ready, params, False, **asked)

    def _thinks(self, messages: Sequence[Message], params: SamplingParams, tools: Sequence[Tool]) -> bool:
        if params.thinking == "auto":
            last = next((message for message in reversed(messages) if message.role == "user"), None)
            num_media = len(last.parts) - sum(hasattr(part, "text") for part in last.parts) if last else 0
            return needs_thinking(last.text if last else "", num_media, bool(tools))
        return params.thinking == "on"

    def _prompt(
        self, messages: Sequence[Message], tools: Sequence[Tool], is_thinking: bool
    ) -> tuple[Prompt, bool]:
        """The rendered prompt, and whether it ends inside an open thinking block."""
        prompt = self._template.render(messages, thinking=is_thinking, tools=tools)
        return prompt, is_thinking

    def _ready(
        self,
        prompt: Prompt,
        params: SamplingParams,
        is_thinking: bool,
        parser: ParserName = "ernie-45-vl",
        has_tools: bool = False,
        request_id: str | None = None,
        priority: int = 0,
        salt: str = "",
        adapter: str = "",
    ) -> list[Asked]:
        name = request_id or f"request-{next(_names)}"
        media = MediaBlob.all_of(prompt)
        if media and self.config is not None and not self.config.is_multimodal:
            raise PromptError("this model reads text alone; send no pictures or videos")
        images = sum(m.num_tokens for m in media if m.kind == "image")
        videos = sum(m.num_tokens for m in media if m.kind == "video")
        ready = []
        for index in range(params.n):
            own = params if params.seed is None else replace(params, seed=params.seed + index)
            request = Request(
                f"{name}/{index}" if params.n > 1 else name,
                tuple(prompt.ids), own, media, is_thinking, priority, salt, adapter,
            )  # fmt: skip
            self.engine.validate(request)
            thinking: ThinkingMode = "on" if is_thinking else "off"
            ready.append(Asked(request, own, thinking, has_tools, parser, images, videos))
        return ready

    def _choices(self, request_id: str) -> list[str]:
        return [
            name for name in self.engine.open_ids() if name == request_id or name.startswith(request_id + "/")
        ]

    def _stream(self, asked: list[Asked]) -> Iterator[Delta]:
        arrivals: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
        readers = [Reader(self.tokenizer, ready, index) for index, ready in enumerate(asked)]
        open_ids = set()
        try:
            for index, ready in enumerate(asked):
                self.engine.submit(ready.request, lambda out, i=index: arrivals.put((i, out)))  # type: ignore[misc]
                open_ids.add(ready.request.request_id)
            while open_ids:
                index, output = arrivals.get()
                if output.finish_reason is not None:
                    open_ids.discard(output.request_id)
                yield from readers[index].read(output)
        finally:
            self._drop(open_ids)

    async def _astream(self, asked: list[Asked]) -> AsyncIterator[Delta]:
        arrivals: Box[tuple[int, Output]] = Box()
        readers = [Reader(self.tokenizer, ready, index) for index, ready in enumerate(asked)]
        open_ids = set()
        try:
            for index, ready in enumerate(asked):
                self.engine.submit(ready.request, lambda out, i=index: arrivals.post((i, out)))  # type: ignore[misc]
                open_ids.add(ready.request.request_id)
            while open_ids:
                index, output = await arrivals.get()
                if output.finish_reason is not None:
                    open_ids.discard(output.request_id)
                for delta in readers[index].read(output):
                    yield delta
        finally:
            self._drop(open_ids)

    def _drop(self, open_ids: set[str]) -> None:
        for name in open_ids:
            with suppress(EngineError):  # the engine is gone, and the request with it
                self.engine.cancel(name)

    def _whole(
        self,
        deltas: Iterator[Delta],
        params: SamplingParams,
        messages: Sequence[Message],
        tools: Sequence[Tool],
    ) -> Completion:
        pieces: dict[int, list[Delta]] = {}
        for delta in deltas:
            pieces.setdefault(delta.index, []).append(delta)
        is_thinking = bool(messages) and self._thinks(messages, params, tools)
        choices = [whole(pieces[index], params, is_thinking) for index in sorted(pieces)]
        usage = choices[0].usage
        if len(choices) > 1:
            usage = replace(
                usage,
                completion_tokens=sum(c.usage.completion_tokens for c in choices),
                reasoning_tokens=sum(c.usage.reasoning_tokens for c in choices),
            )
        return replace(choices[0], usage=usage, choices=tuple(choices[1:]))

    def _score(self, prompt: Prompt, option: str) -> Any:
        """Begins to score an option after a prompt; the result, when called for, is its log-probability."""
        ids = tuple(self.tokenizer.encode(option))
        if not ids:
            raise ConfigError("an option is empty; give at least one character")
        params = SamplingParams(max_tokens=len(ids), forced=ids, logprobs=0, thinking="off", ignore_eos=True)
        ready = self._ready(prompt, params, False)[0]
        logprobs: list[TokenLogprob] = []
        done = threading.Event()
        failures: list[str] = []

        def sink(output: Output) -> None:
            logprobs.extend(output.logprobs)
            if output.finish_reason is not None:
                if output.finish_reason in ("error", "abort"):
                    failures.append(output.cause)
                done.set()

        self.engine.submit(ready.request, sink)

        def wait() -> float:
            done.wait()
            if failures:
                raise EngineError(f"the question was not answered: {failures[0]}")
            return sum(entry.logprob for entry in logprobs)

        return wait


def embedded_folder() -> Path:
    """Where the embedded model lies."""
    found = sorted(ASSETS.glob("*/config.json")) or sorted(ASSETS.glob("config.json"))
    if not found:
        raise CheckpointError("no model is embedded in this build; name a checkpoint folder")
    return found[0].parent


def _no_folder(folder: Path) -> Tokenizer:
    raise CheckpointError(f"{folder} is no folder; a checkpoint is one with config.json and weights in it")
