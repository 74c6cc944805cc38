"""Every environment variable duomo reads: name, type, default and one sentence. Read nowhere else.

A variable is declared once, as a `Variable`, and read through it, at the moment it is needed.
`duomo env` prints this table. A value that does not parse is a `ConfigError`, never a silent default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from duomo.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    name: str
    parse: Callable[[str], T]
    default: T
    meaning: str

    def get(self) -> T:
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigError(f"{self.name}={text!r} is not valid: {error}. {self.meaning}") from error


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


CPU_ISA = Variable(
    "DUOMO_CPU_ISA",
    _choice("", "portable", "avx2", "avx512", "neon"),
    "",
    "Caps the instruction set of the CPU kernels: portable, avx2, avx512 or neon; never raises it.",
)
NUM_THREADS = Variable(
    "DUOMO_NUM_THREADS", int, 0, "Threads of the CPU kernels; 0 takes the cores this process may use."
)
KERNELS = Variable(
    "DUOMO_KERNELS",
    _choice("", "reference", "cpu"),
    "",
    "Forces one kernel set: reference (plain torch) or cpu (native); empty picks the fastest there is.",
)
API_KEYS = Variable(
    "DUOMO_API_KEYS",
    str,
    "",
    "Keys the server accepts, separated by commas; `--api-key-file` is the better way.",
)

VARIABLES: tuple[Variable[str] | Variable[int], ...] = (CPU_ISA, NUM_THREADS, KERNELS, API_KEYS)
