"""The real backend behind the server. Written against duomo.llm."""

from __future__ import annotations

from duomo.errors import ConfigError
from duomo.serve.backend import Backend
from duomo.serve.options import Options


async def open_backend(options: Options) -> Backend:
    raise ConfigError("this build has no engine yet; --engine scripted tries the server without one")
