"""duomo: ERNIE-4.5-VL on the machine you have.

The public names, loaded when first used: `import duomo` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duomo.checkpoints import load_model
    from duomo.engine.request import Completion, SamplingParams
    from duomo.errors import Error
    from duomo.llm import LLM
    from duomo.model.config import ModelConfig
    from duomo.processing.messages import Message
    from duomo.quant import quantize
    from duomo.serve.app import create_app
    from duomo.train.loop import finetune

__version__ = "0.1.0"

_HOMES = {
    "LLM": "duomo.llm",
    "Message": "duomo.processing.messages",
    "SamplingParams": "duomo.engine.request",
    "Completion": "duomo.engine.request",
    "ModelConfig": "duomo.model.config",
    "load_model": "duomo.checkpoints",
    "Error": "duomo.errors",
    "create_app": "duomo.serve.app",
    "quantize": "duomo.quant",
    "finetune": "duomo.train.loop",
}

__all__ = [
    "LLM",
    "Completion",
    "Error",
    "Message",
    "ModelConfig",
    "SamplingParams",
    "create_app",
    "finetune",
    "load_model",
    "quantize",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'duomo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
