"""From the engine's outputs to deltas, and from deltas to a whole completion: the same pieces, added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from duomo.engine.request import (
    Completion,
    Delta,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    ThinkingMode,
    Usage,
    join_traces,
)
from duomo.engine.text import AnswerText
from duomo.errors import EngineError
from duomo.processing.reasoning import ParserName
from duomo.processing.tokenizer import Tokenizer
from duomo.processing.tools import CallPiece, join_calls


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt made ready: what the engine gets, and what is needed to read its answer."""

    request: Request
    params: SamplingParams
    thinking: ThinkingMode
    has_tools: bool
    parser: ParserName
    image_tokens: int
    video_tokens: int


class Reader:
    """Turns one choice's outputs into deltas."""

    def __init__(self, tokenizer: Tokenizer, asked: Asked, index: int) -> None:
        self._asked, self._index, self._num_tokens = asked, index, 0
        self._text = AnswerText(
            tokenizer,
            asked.parser,
            asked.request.is_thinking,
            asked.params.stop,
            asked.has_tools,
            f"call-{asked.request.request_id}",
        )
        self._has_calls = False

    def read(self, output: Output) -> Iterator[Delta]:
        if output.finish_reason == "error":
            raise EngineError(f"the answer broke off: {output.cause}", cause=output.cause)
        self._num_tokens += len(output.token_ids)
        piece = self._text.add(output.token_ids)
        reason: FinishReason | None = output.finish_reason
        if reason is not None:
            piece.add(self._text.finish())
        self._has_calls = self._has_calls or any(call.is_complete for call in piece.calls)
        if reason == "stop" and self._has_calls:
            reason = "tool_calls"
        yield Delta(
            index=self._index,
            text=piece.content,
            reasoning=piece.reasoning,
            tool_calls=tuple(piece.calls),
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=reason,
            usage=self._usage(output),
            thinking=None if reason is None else self._asked.thinking,
            experts=output.experts,
        )

    def _usage(self, output: Output) -> Usage:
        return Usage(
            prompt_tokens=len(self._asked.request.ids),
            completion_tokens=self._num_tokens,
            reasoning_tokens=output.num_reasoning,
            cached_tokens=output.num_cached,
            image_tokens=self._asked.image_tokens,
            video_tokens=self._asked.video_tokens,
        )


def whole(deltas: list[Delta], params: SamplingParams, is_thinking: bool) -> Completion:
    last = deltas[-1]
    calls: list[CallPiece] = [call for delta in deltas for call in delta.tool_calls]
    return Completion(
        text="".join(delta.text for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        tool_calls=join_calls(calls),
        finish_reason=last.finish_reason or "abort",
        usage=last.usage or Usage(),
        thinking="on" if is_thinking else "off",
        thinking_budget=params.thinking_budget if is_thinking else None,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        prompt_logprobs=tuple(entry for delta in deltas for entry in delta.prompt_logprobs),
        experts=join_traces([delta.experts for delta in deltas if delta.experts is not None]),
    )
