"""Every error duomo raises on purpose, drawn as one tree.

    Error
    ├── ConfigError                 a model or run configuration that cannot be right
    ├── CheckpointError             files on disk
    │   ├── MissingTensor
    │   ├── UnexpectedTensor
    │   ├── ShapeMismatch
    │   └── CorruptFile
    ├── MediaError                  pictures and videos
    │   ├── UnsupportedMedia
    │   ├── MediaTooLarge
    │   └── FetchRefused
    ├── PromptError                 what was asked
    │   ├── PromptTooLong
    │   └── TemplateError
    ├── EngineError                 running requests
    │   ├── OutOfPages
    │   └── Aborted
    ├── GrammarError                a constraint that cannot be compiled or met
    ├── KernelError                 native code
    │   └── NoBackend
    └── TrainingError

A message is one line: what is wrong, then what would be right. The facts stay available as attributes,
so that a caller never parses a message. Our own bugs are `assert`s, not members of this tree.
"""

from __future__ import annotations


class Error(Exception):
    """Base of all errors raised on purpose. `facts` holds what the message was made of."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __getattr__(self, name: str) -> object:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.facts)


def _rebuild(kind: type[Error], message: str, facts: dict[str, object]) -> Error:
    return kind(message, **facts)


class ConfigError(Error): ...


class CheckpointError(Error): ...


class MissingTensor(CheckpointError): ...


class UnexpectedTensor(CheckpointError): ...


class ShapeMismatch(CheckpointError): ...


class CorruptFile(CheckpointError): ...


class MediaError(Error): ...


class UnsupportedMedia(MediaError): ...


class MediaTooLarge(MediaError): ...


class FetchRefused(MediaError): ...


class PromptError(Error): ...


class PromptTooLong(PromptError): ...


class TemplateError(PromptError): ...


class EngineError(Error): ...


class OutOfPages(EngineError): ...


class Aborted(EngineError): ...


class GrammarError(Error): ...


class KernelError(Error): ...


class NoBackend(KernelError): ...


class TrainingError(Error): ...
