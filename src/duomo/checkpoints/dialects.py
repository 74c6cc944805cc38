"""Where a tensor of the PT layout is found in the other layouts, and how it is turned into it.

`PT` is what Baidu's -PT repositories and transformers' `save_pretrained` ship (the latter with
`model.vision_model.`), `Paddle` what the -Paddle ones ship ([in, out], q|k|v and gate|up fused), `Native`
transformers' own names in memory (experts stacked). Spec section 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from duomo.model.config import ModelConfig

Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor and how to get the PT tensor out of it."""

    name: str
    turn: Turn = lambda tensor: tensor


class Dialect(Protocol):
    """`place(name)` for a name of the PT layout."""

    title: str

    def place(self, name: str) -> Place: ...


def recognise(names: Iterable[str], config: ModelConfig) -> Dialect:
    """The dialect of a checkpoint, by the names in it."""
    stored = set(names)
    if any(name.startswith("ernie.") for name in stored):
        return Paddle(config, stored)
    if any(".text_moe." in name or ".vision_moe." in name for name in stored):
        return Native(config, stored)
    return PT(stored)


class PT:
    """Names as they are; the vision tower and the language model may carry transformers' prefixes."""

    title = "PT"

    def __init__(self, stored: Container[str]) -> None:
        self._stored = stored

    def place(self, name: str) -> Place:
        for candidate in _spellings(name):
            if candidate in self._stored:
                return Place(candidate)
        return Place(name)


def _spellings(name: str) -> tuple[str, ...]:
    if name.startswith("vision_model."):
        return name, f"model.{name}"
    if name.startswith("model.") and "resampler" not in name:
        return name, name.replace("model.", "model.language_model.", 1)
    return (name,)


class Paddle:
    """Linear weights are [in, out]; routers, embeddings and the head are as in PT."""

    title = "Paddle"
    _QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)$")
    _GATE_UP = re.compile(r"\.(gate|up)_proj\.(weight|bias)$")

    def __init__(self, config: ModelConfig, stored: Container[str]) -> None:
        self._config, self._stored = config, stored

    def place(self, name: str) -> Place:
        theirs = "ernie." + name.removeprefix("model.") if name.startswith("model.") else name
        if match := self._QKV.search(theirs):
            start, stop = self._qkv_rows(match[1])
            fused = theirs.replace(f"{match[1]}_proj", "qkv_proj")
            return Place(fused, lambda tensor: _rows_first(tensor)[start:stop])
        if match := self._GATE_UP.search(theirs):
            fused = theirs.replace(f"{match[1]}_proj", "up_gate_proj")
            which = 0 if match[1] == "gate" else 1  # the gate comes first, whatever the name says
            return Place(fused, lambda tensor: _rows_first(tensor).chunk(2)[which])
        if theirs == "lm_head.weight":
            vocab_size = self._config.vocab_size
            return Place(theirs, lambda tensor: tensor if tensor.shape[0] == vocab_size else tensor.T)
        if not theirs.endswith(".weight") or "embed_tokens" in theirs or ".gate." in theirs:
            return Place(theirs)
        return Place(theirs, _rows_first)

    def _qkv_rows(self, letter: str) -> tuple[int, int]:
        query = self._config.num_heads * self._config.head_dim
        key = self._config.num_kv_heads * self._config.head_dim
        starts = {"q": (0, query), "k": (query, query + key), "v": (query + key, query + 2 * key)}
        return starts[letter]


def _rows_first(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor


class Native:
    """transformers' names in memory: experts stacked, routers [out, in], one bias a bank."""

    title = "transformers-native"
    _EXPERT = re.compile(r"^(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight$")

    def __init__(self, config: ModelConfig, stored: Container[str]) -> None:
        assert config.text_experts is not None
        self._stored, self._num_text = stored, config.text_experts.num_experts

    def place(self, name: str) -> Place:
        theirs = name.replace("vision_model.", "model.vision_tower.")
        if name.startswith("model.") and "resampler" not in name:
            theirs = name.replace("model.", "model.language_model.", 1)
        for index, word in (
            ("linear.0", "linear.fc1"),
            ("linear.2", "linear.fc2"),
            ("linear.3", "linear.ln"),
        ):
            theirs = theirs.replace(index, word)
        if match := self._EXPERT.match(theirs):
            return self._expert(match[1], int(match[2]), match[3])
        for old, bank in ((".gate.weight_1", "vision"), (".gate.weight", "text")):
            if theirs.endswith(old):
                return Place(theirs.removesuffix(old) + f".{bank}_moe.gate.weight", _rows_first)
        return Place(theirs)

    def bias(self, name: str, row: int) -> str:
        bank = "vision" if row else "text"
        theirs = name.replace("model.", "model.language_model.", 1)
        return theirs.replace("mlp.moe_statics", f"mlp.{bank}_moe.gate.moe_statics")

    def _expert(self, prefix: str, index: int, matrix: str) -> Place:
        bank, expert = ("text", index) if index < self._num_text else ("vision", index - self._num_text)
        stacked = f"{prefix}.{bank}_moe.experts."
        if matrix == "down":
            return Place(stacked + "down_proj", lambda tensor: tensor[expert])
        half = 0 if matrix == "gate" else 1
        return Place(stacked + "gate_up_proj", lambda tensor: tensor[expert].chunk(2)[half])
