"""What people say: a message is a role and a list of parts. No torch, no pixels decoded yet.

The wire formats (OpenAI's, Anthropic's) are turned into these in `serve`; the chat template turns these
into ids. Media parts hold bytes as they came; `processing.images` and `processing.video` decode them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An encoded picture (PNG, JPEG, ...) and, per request, the pixels it may be resized between."""

    data: bytes
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class VideoPart:
    """An encoded video; `fps`, `min_frames`, `max_frames` and pixels override the defaults."""

    data: bytes
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    target_frames: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


Part: TypeAlias = TextPart | ImagePart | VideoPart


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is a JSON schema."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning` and `tool_calls` belong to an assistant, `tool_call_id` to a tool's result."""

    role: Role
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @classmethod
    def of(cls, role: Role, *contents: str | Part) -> Message:
        """`Message.of("user", ImagePart(png), "What is this?")`."""
        return cls(role, tuple(TextPart(c) if isinstance(c, str) else c for c in contents))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


Conversation: TypeAlias = Sequence[Message]
