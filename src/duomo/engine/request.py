"""What is asked of the engine and what comes back, as frozen values. Plain Python.

Everything here crosses the process seam, so it is made of ints, floats, strings, bytes and tuples.
Ids in, ids out: text, reasoning and tool calls are put together above, in `duomo.llm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from duomo.errors import ConfigError

if TYPE_CHECKING:
    from duomo.processing.prompt import Prompt

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]
ThinkingMode = Literal["on", "off", "auto"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """One constraint on the answer (never on the thinking), in llguidance's terms."""

    kind: Literal["json_schema", "json_object", "regex", "grammar", "choice"]
    value: str = ""  # a JSON schema, a regex, a Lark grammar, or a JSON list of choices


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is drawn. Validated on construction: a value out of range is a ConfigError."""

    max_tokens: int | None = None  # None: whatever the context leaves
    temperature: float = 0.2
    top_p: float = 0.8
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many alternatives a token; 0: the chosen one alone
    prompt_logprobs: int | None = None
    thinking: ThinkingMode = "auto"
    thinking_budget: int | None = None  # tokens of thinking; None: no bound of its own
    wrap_up: str = ""  # thinking that is cut ends with this sentence, inside the budget
    forced: tuple[int, ...] = ()  # the answer begins with these ids: how given words are scored
    constraint: Constraint | None = None
    return_experts: bool = False  # say which experts computed each token, prompt and answer alike

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must be between {low:g} and {high:g}", name=name)
        if len(self.stop) > 16:
            raise ConfigError(f"stop has {len(self.stop)} strings; at most 16 are allowed", name="stop")
        if any(not text for text in self.stop):
            raise ConfigError("stop has an empty string; give at least one character", name="stop")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_tokens", 1, 1 << 24),
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 1 << 24),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 10.0),
    ("seed", -(1 << 63), (1 << 64) - 1),
    ("n", 1, 128),
    ("min_tokens", 0, 1 << 24),
    ("logprobs", 0, 64),
    ("prompt_logprobs", 0, 64),
    ("thinking_budget", 0, 1 << 24),
)


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability of one token, and of the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ExpertTrace:
    """Which experts computed consecutive tokens of one request; the answer's follow on the prompt's.

    A token's row says where it went itself, so an answer's token was chosen by the row before its own.
    """

    start: int  # place of the first token; what came from the prefix cache was not computed
    num_layers: int
    num_chosen: int
    expert_ids: bytes  # uint8 [tokens, layers, chosen] in the bank of the token's modality; 255: no experts
    is_vision: bytes  # uint8 [tokens], 1 where the token went to the vision experts


def cut_trace(trace: ExpertTrace, count: int) -> ExpertTrace:
    """The first `count` tokens: what follows were drafts that were not kept."""
    width = trace.num_layers * trace.num_chosen
    return replace(trace, expert_ids=trace.expert_ids[: count * width], is_vision=trace.is_vision[:count])


def join_traces(traces: Sequence[ExpertTrace]) -> ExpertTrace | None:
    """One after another. A token computed twice (after a preemption) counts once: later rows are the same."""
    if not traces:
        return None
    first, width = traces[0], traces[0].num_layers * traces[0].num_chosen
    ids, is_vision = bytearray(), bytearray()
    for trace in traces:
        known = first.start + len(is_vision) - trace.start
        ids += trace.expert_ids[max(0, known) * width :]
        is_vision += trace.is_vision[max(0, known) :]
    return replace(first, expert_ids=bytes(ids), is_vision=bytes(is_vision))


@dataclass(frozen=True, slots=True)
class MediaBlob:
    """A decoded medium as it crosses the seam: uint8 patches as bytes, and where its tokens lie."""

    kind: Literal["image", "video"]
    start: int
    grid: tuple[int, int, int]  # frames, rows, columns of patches
    content_hash: bytes
    patches: bytes

    @classmethod
    def all_of(cls, prompt: Prompt) -> tuple[MediaBlob, ...]:
        """The media of a prompt, in its order."""
        return tuple(
            cls(
                medium.kind,
                span.start,
                (medium.grid.frames, medium.grid.rows, medium.grid.columns),
                medium.content_hash,
                medium.patches.tobytes(),
            )
            for medium, span in zip(prompt.media, prompt.spans, strict=True)
        )

    @property
    def num_tokens(self) -> int:
        frames, rows, columns = self.grid
        return max(1, frames // 2) * (rows // 2) * (columns // 2)


@dataclass(frozen=True, slots=True)
class Request:
    """One answer wanted. `is_thinking`: the prompt ends inside an open thinking block."""

    request_id: str
    ids: tuple[int, ...]
    params: SamplingParams
    media: tuple[MediaBlob, ...] = ()
    is_thinking: bool = False
    priority: int = 0  # smaller runs first
    salt: str = ""  # prompts of different salts never share a cache
    adapter: str = ""  # which LoRA, "" for none


class Output(Struct, frozen=True):
    """What one step added to one request. `cause` says why it finished, beyond OpenAI's word for it.

    There is one for every token: a Struct is made in a tenth of a frozen dataclass's time.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    num_reasoning: int = 0  # of all tokens so far
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    experts: ExpertTrace | None = None
    cause: str = ""  # eos, stop_id, stop_string, length, grammar, cancelled, or an error's message


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of a streamed answer; `index` counts the choices of `n`. The last has a finish reason.

    `usage` is that of the choice so far.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[Any, ...] = ()  # of processing.tools.CallPiece: calls as they grow
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    thinking: ThinkingMode | None = None  # with the last piece: what was in effect, on or off
    experts: ExpertTrace | None = None  # where asked for


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `thinking` and `thinking_budget` are the values in effect, whatever was asked."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[Any, ...] = ()  # of processing.messages.ToolCall
    finish_reason: FinishReason = "stop"
    usage: Usage = field(default_factory=Usage)
    thinking: ThinkingMode = "off"
    thinking_budget: int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    experts: ExpertTrace | None = None  # of the whole request, where asked for
    choices: tuple[Completion, ...] = ()  # the further ones where n > 1
