"""The model behind the server: `duomo.llm.LLM` seen through the protocol of `serve.backend`.

Every call here is about shapes alone: options to `LLM.open`, a `Job` to a stream, a `Delta` to a `Piece`.
A forced tool call (required, or one named) becomes a grammar, so that it is valid whatever the temperature.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from duomo.checkpoints.fit import parse_bytes
from duomo.engine.request import Constraint, Delta, TokenLogprob
from duomo.errors import PromptError
from duomo.llm import LLM, Question
from duomo.processing.decoding import DecodeLimits, Decoders
from duomo.processing.messages import Message
from duomo.serve.backend import Backend, Count, Job, ModelFacts, Piece, TokenInfo, ToolPiece
from duomo.serve.options import Options


async def open_backend(options: Options) -> Backend:
    """Opens the model in a thread, so that the server answers /health meanwhile."""
    given: dict[str, Any] = {
        "dtype": options.dtype,
        "kv_dtype": options.kv_cache_dtype,
        "max_model_tokens": options.max_model_len,
        "max_sequences": options.max_num_seqs,
        "max_step_tokens": options.max_num_batched_tokens,
        "page_size": options.block_size,
        "feature_folder": options.encoder_cache_dir,
        "kv_bytes": None if options.kv_mb is None else options.kv_mb << 20,
        "ram_bytes": None if options.ram is None else parse_bytes(options.ram),
    }
    asked = {name: value for name, value in given.items() if value is not None}
    asked |= {
        "has_prefix_cache": options.enable_prefix_caching,
        "weights_idle_s": options.weights_idle_s,
        "num_drafts": options.num_drafts,
        "parser": options.reasoning_parser,
        "own_process": options.engine_process,
    }
    limits = DecodeLimits(options.media_memory_mb << 20, options.media_decode_s, 2.0 * options.media_decode_s)
    cache_bytes = int(max(0.0, options.max_processor_cache) * (1 << 30))
    decoders = Decoders(options.media_workers, limits, cache_bytes)
    try:
        llm = await asyncio.to_thread(partial(LLM.open, options.model, load=decoders.load, **asked))
    except BaseException:
        decoders.close()
        raise
    return Model(llm, decoders)


class Model:
    """A backend over an open LLM; closing it closes the LLM, and the workers that decode for it."""

    def __init__(self, llm: LLM, decoders: Decoders | None = None) -> None:
        self.llm, self._decoders = llm, decoders
        self._running: set[str] = set()
        modalities = ("text", "image", "video") if llm.has_vision else ("text",)
        stats = llm.stats()
        pages = f"{stats['pages']:.0f}" if "pages" in stats else "unknown"
        self._facts = ModelFacts(
            llm.name,
            llm.max_model_tokens,
            modalities,
            {"pages of keys and values": pages},
            llm.sampling,
            _num_experts(llm),
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def is_alive(self) -> bool:
        return self.llm.is_alive

    async def stream(self, job: Job) -> AsyncIterator[Piece]:
        asked = {
            "request_id": job.id, "priority": job.priority, "salt": job.cache_salt, "adapter": job.adapter
        }  # fmt: skip
        if job.id in self._running:
            raise PromptError("a request of this id is running; leave request_id out or make it unique")
        if job.prompt is not None:
            deltas = self.llm.astream_generate(job.prompt, job.params, **asked)
        else:
            tools = () if job.tool_choice == "none" else job.tools
            deltas = self.llm.astream(job.messages, self._params(job), tools, **asked)
        self._running.add(job.id)
        try:
            async for delta in deltas:
                yield self._piece(job, delta)
        finally:
            self._running.discard(job.id)
            await deltas.aclose()  # type: ignore[attr-defined]

    async def count(self, job: Job) -> Count:
        tools = () if job.tool_choice == "none" else job.tools
        count = partial(self.llm.count_tokens, job.messages, tools, thinking=job.params.thinking)
        usage = await asyncio.to_thread(count)
        return Count(usage.prompt_tokens, usage.image_tokens, usage.video_tokens)

    async def decide(
        self, messages: tuple[Message, ...], questions: Sequence[Question]
    ) -> list[dict[str, float]]:
        found = await asyncio.to_thread(self.llm.decide, messages, questions)
        return [one.probabilities for one in found]

    def answer_now(self, job_id: str) -> bool:
        if job_id in self._running:
            self.llm.answer_now(job_id)
        return job_id in self._running

    def cancel(self, job_id: str) -> bool:
        if job_id in self._running:
            self.llm.cancel(job_id)
        return job_id in self._running

    def load_adapter(self, name: str, folder: Path) -> None:
        self.llm.load_adapter(name, folder)

    def unload_adapter(self, name: str) -> None:
        self.llm.unload_adapter(name)

    def encode(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        if any(not 0 <= token < self.llm.tokenizer.vocab_size for token in ids):
            raise PromptError(f"a token is outside the vocabulary of {self.llm.tokenizer.vocab_size}")
        return self.llm.tokenizer.decode(ids)

    def gauges(self) -> Mapping[str, float]:
        stats = self.llm.stats()
        hits = stats.get("feature_hits", 0.0)
        return {
            **stats,
            "prefix_queries": stats.get("queried_tokens", 0.0),
            "prefix_hits": stats.get("cached_tokens", 0.0),
            "feature_queries": hits + stats.get("media_encoded", 0.0),
            "media_kept_bytes": float(self._decoders.kept_bytes) if self._decoders else 0.0,
        }

    def expect_picture(self) -> None:
        self.llm.expect_picture()

    def residency(self) -> Mapping[str, Mapping[str, float | None]]:
        return self.llm.residency_report()

    async def close(self) -> None:
        await asyncio.to_thread(self.llm.close)
        if self._decoders is not None:
            await asyncio.to_thread(self._decoders.close)

    def _params(self, job: Job) -> Any:
        if not job.tools or job.tool_choice in ("auto", "none"):
            return job.params
        return replace(job.params, constraint=_forced_call(job, self.llm))

    def _piece(self, job: Job, delta: Delta) -> Piece:
        tools = tuple(
            ToolPiece(call.index, call.id, call.name, call.arguments, call.is_broken)
            for call in delta.tool_calls
            if (job.parallel_tool_calls or call.index == 0)
            and (call.name or call.arguments or call.is_broken)
        )
        mode = None
        if delta.finish_reason is not None and delta.usage is not None:
            mode = (
                "on" if delta.usage.reasoning_tokens else ("off" if job.params.thinking == "auto" else None)
            )
        return Piece(
            delta.index,
            delta.text,
            delta.reasoning,
            tools,
            delta.token_ids,
            tuple(self._info(entry) for entry in delta.logprobs),
            delta.finish_reason,
            delta.usage,
            mode,  # type: ignore[arg-type]
            delta.experts,
        )

    def _info(self, entry: TokenLogprob) -> TokenInfo:
        data = self._bytes(entry.token_id)
        top = tuple(
            (self._bytes(token).decode(errors="replace"), value, self._bytes(token))
            for token, value in entry.top
        )
        return TokenInfo(data.decode(errors="replace"), entry.logprob, data, top)

    def _bytes(self, token_id: int) -> bytes:
        return self.llm.engine.vocabulary.tokens[token_id]


def _num_experts(llm: LLM) -> tuple[int, int] | None:
    config = llm.config
    if config is None or config.text_experts is None:
        return None
    vision = config.vision_experts
    return config.text_experts.num_experts, vision.num_experts if vision else 0


def _forced_call(job: Job, llm: LLM) -> Constraint:
    """A Lark grammar of one call, or of several where parallel calls are allowed and none is named."""
    named = [tool for tool in job.tools if tool.name == job.tool_choice]
    tools = named or list(job.tools)
    many = "+" if job.parallel_tool_calls and not named else ""

    def literal(text: str) -> str:
        return text if llm.tokenizer.find_special(text) is not None else json.dumps(text)

    rules = [f"start: call{many}", "call: " + " | ".join(f"call{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        arguments = tool.parameters or {"type": "object"}
        shape = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        body = json.dumps(shape, ensure_ascii=False)
        rules.append(
            f'call{index}: {literal("<tool_call>")} "\\n" %json {body} "\\n" {literal("</tool_call>")} "\\n"'
        )
    return Constraint("grammar", "\n".join(rules))
