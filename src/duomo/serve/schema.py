"""The wire types of OpenAI's chat and text completions, as msgspec structs. No behaviour beyond defaults.

Requests list every field that has a meaning here, with the spellings of vLLM, llama.cpp, FastDeploy and
Anthropic beside OpenAI's where they differ; `serve.thinking` and `serve.sampling` say which one wins.
Answers carry `reasoning_content` and `reasoning` with the same text, since clients are split on the name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

Fraction: TypeAlias = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2.0, le=2.0)]
Temperature: TypeAlias = Annotated[float, Meta(ge=0.0, le=2.0)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 24)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 24)]
Pixels: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 28)]
Strings: TypeAlias = Annotated[list[str], Meta(max_length=16)]
Object: TypeAlias = dict[str, Any]

# ---- what messages hold ----


class TextContent(Struct, tag="text", tag_field="type"):
    text: str


class MediaSource(Struct):
    """Where a picture or video is: a data:, http(s): or file: address, and how large it may become."""

    url: str
    detail: Literal["low", "high", "auto", "original"] | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    fps: Annotated[float, Meta(gt=0, le=60)] | None = None
    min_frames: Positive | None = None
    max_frames: Positive | None = None
    target_frames: Positive | None = None


class ImageContent(Struct, tag="image_url", tag_field="type"):
    image_url: MediaSource | str
    uuid: str | None = None


class VideoContent(Struct, tag="video_url", tag_field="type"):
    video_url: MediaSource | str
    uuid: str | None = None


class RefusalContent(Struct, tag="refusal", tag_field="type"):
    refusal: str


Content: TypeAlias = TextContent | ImageContent | VideoContent | RefusalContent


class FunctionCall(Struct):
    name: str
    arguments: str | Object = "{}"


class ToolCallIn(Struct):
    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class ChatMessage(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Content] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallIn] | None = None
    tool_call_id: str | None = None


# ---- tools and structured output ----


class FunctionSpec(Struct):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class ToolSpec(Struct):
    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(Struct):
    name: str


class NamedTool(Struct):
    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | NamedTool


class JsonSchema(Struct):
    schema: Object
    name: str = "answer"
    description: str | None = None
    strict: bool | None = None


class TextFormat(Struct, tag="text", tag_field="type"):
    pass


class JsonObjectFormat(Struct, tag="json_object", tag_field="type"):
    pass


class JsonSchemaFormat(Struct, tag="json_schema", tag_field="type"):
    json_schema: JsonSchema


ResponseFormat: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Struct):
    json: Object | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


# ---- thinking ----

Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ThinkingSwitch(Struct):
    """Anthropic's object; `adaptive` is our auto."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class ReasoningSwitch(Struct):
    """The object of OpenAI's Responses and of OpenRouter."""

    effort: Effort | None = None
    max_tokens: Count | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    summary: str | None = None


class TemplateOptions(Struct):
    thinking_mode: Literal["open", "close", "auto"] | None = None


class TemplateKwargs(Struct):
    enable_thinking: bool | None = None
    thinking: bool | None = None
    options: TemplateOptions | None = None


class StreamOptions(Struct):
    include_usage: bool = True
    continuous_usage_stats: bool = False


class MediaKwargs(Struct):
    """Preprocessing of this request's media, by FastDeploy's and Hugging Face's names."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    image_min_pixels: Pixels | None = None
    image_max_pixels: Pixels | None = None
    video_min_pixels: Pixels | None = None
    video_max_pixels: Pixels | None = None
    video_fps: Annotated[float, Meta(gt=0, le=60)] | None = None
    video_min_frames: Positive | None = None
    video_max_frames: Positive | None = None
    video_target_frames: Positive | None = None


class Generation(Struct, kw_only=True):
    """Fields that chat and text completions share."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    min_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 24)] | None = None
    min_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=16)] | None = None
    stop: str | Strings | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] | None = None
    ignore_eos: bool | None = None
    bad_words: Annotated[list[str], Meta(max_length=64)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    return_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Object | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    user: str | None = None
    metadata: Object | None = None
    store: bool | None = None


class ChatRequest(Generation, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    mm_processor_kwargs: MediaKwargs | None = None
    # thinking, in every spelling (serve.thinking says which wins)
    thinking: bool | Count | Literal["on", "off", "auto"] | ThinkingSwitch | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningSwitch | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    thinking_budget: Count | None = None
    thinking_token_budget: Count | None = None
    thinking_budget_tokens: Count | None = None
    reasoning_max_tokens: Count | None = None
    include_reasoning: bool | None = None
    return_experts: bool | None = None  # which experts computed each token


class CompletionRequest(Generation, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=16)] | None = None
    response_format: ResponseFormat | None = None


# ---- answers ----


class PromptDetails(Struct):
    cached_tokens: int = 0
    image_tokens: int = 0
    video_tokens: int = 0


class CompletionDetails(Struct):
    reasoning_tokens: int = 0


class UsageOut(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = field(default_factory=PromptDetails)
    completion_tokens_details: CompletionDetails = field(default_factory=CompletionDetails)


class ThinkingOut(Struct):
    """The values in effect, and the field that decided them."""

    mode: Literal["on", "off", "auto"]
    budget: int | None
    decided_by: str


class FunctionOut(Struct):
    name: str
    arguments: str


class ToolCallOut(Struct):
    id: str
    function: FunctionOut
    type: Literal["function"] = "function"


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob] | None


Finish: TypeAlias = Literal["stop", "length", "tool_calls", "content_filter", "abort", "error"]


class ChatAnswer(Struct):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    reasoning: str | None
    refusal: str | None = None
    tool_calls: list[ToolCallOut] | msgspec.UnsetType = msgspec.UNSET


class ExpertsOut(Struct):
    """Which experts computed consecutive tokens of prompt and answer, from token `start` on.

    `ids` is base64 of uint8 [tokens, layers, chosen], 255 in a layer without experts; `vision` lists the
    stretches [first, end) of tokens that went to the vision experts, the others went to the text experts.
    """

    start: int
    tokens: int
    layers: int
    chosen: int
    ids: str
    vision: list[tuple[int, int]]


class ChatChoice(Struct):
    index: int
    message: ChatAnswer
    finish_reason: Finish
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    experts: ExpertsOut | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageOut
    thinking: ThinkingOut
    object: Literal["chat.completion"] = "chat.completion"
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Struct, omit_defaults=True):
    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionDelta | None = None


class Delta(Struct):
    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    experts: ExpertsOut | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageOut | msgspec.UnsetType | None = msgspec.UNSET
    thinking: ThinkingOut | msgspec.UnsetType = msgspec.UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Struct):
    index: int
    text: str
    finish_reason: Finish | None
    logprobs: TextLogprobs | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class TextCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageOut | msgspec.UnsetType | None = msgspec.UNSET
    object: Literal["text_completion"] = "text_completion"


class ExpertCounts(Struct):
    """Routed experts in a layer that has any, by bank; 0 where there is no such bank."""

    text: int
    vision: int


class InputTokens(Struct):
    """What a request would take of `max_model_len`; `media_tokens` in the order of the media, if known."""

    input_tokens: int
    image_tokens: int
    video_tokens: int
    media_tokens: list[int]
    max_model_len: int
    object: Literal["chat.completion.input_tokens"] = "chat.completion.input_tokens"


class ModelCard(Struct):
    """`max_model_len` tokens of context; `modalities` a message may hold; an adapter has a `parent`.

    `experts` null: a dense model.
    """

    id: str
    created: int
    max_model_len: int
    root: str
    modalities: list[str]
    experts: ExpertCounts | None = None
    parent: str | None = None
    owned_by: str = "duomo"
    object: Literal["model"] = "model"


class ModelList(Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"
