"""Which weights get how many bits. Routed experts are nine tenths of the bytes; the rest is cheap to keep.

Presets: `2` puts routed experts at 2 bits, `2.3` the first and last expert layers at 4 (but the last one's
vision experts, which no text token hears), `4` all of them. In all of them attention, shared experts and
dense layers take 4 bits, embeddings, head, tower and resampler 8, norms, biases and routers float32; where
that is asked for, embeddings and head take 6 and attention 8. `auto` starts from `2` and raises banks of
experts to 4 bits, the most KL saved per byte first, until a budget of bytes is spent. A shape the trellis
cannot hold is stored at 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from duomo.errors import ConfigError
from duomo.model.config import ModelConfig
from duomo.trellis.code import LCC2_12, LCC4_12, TrellisCode


class Kind(Enum):
    PLAIN = "plain"  # float32
    INT8 = "int8"
    INT6 = "int6"
    FOUR = "four"
    TWO = "two"


_BANK = re.compile(r"decoder\.layers\.(\d+)\.mlp\.(text|vision)\.(gate_up|down)$")
_ATTENTION = re.compile(r"decoder\.layers\.\d+\.attention\.[qkvo]\.weight$")
_DENSE = re.compile(r"decoder\.layers\.\d+\.mlp\.(shared\.)?(gate|up|down)\.weight$")
_LINEAR = re.compile(r"(vision_tower|resampler)\..*(patch_embed|qkv|out|fc1|fc2|project)\.weight$")
PRESETS = ("2", "2.3", "4", "auto")


@dataclass(frozen=True)
class BitPlan:
    """`raised` are the banks of routed experts that take 4 bits, as "layer.modality"."""

    name: str = "2"
    raised: frozenset[str] = frozenset()
    embedding: Kind = Kind.INT8
    attention: Kind = Kind.FOUR
    dense: Kind = Kind.FOUR
    tower: Kind = Kind.INT8
    two: TrellisCode = LCC2_12
    four: TrellisCode = LCC4_12

    def kind(self, name: str) -> Kind:
        """How the parameter of that name (our state-dict name) is stored, were its shape to fit."""
        if bank := _BANK.match(name):
            return Kind.FOUR if f"{bank[1]}.{bank[2]}" in self.raised else Kind.TWO
        if name in ("embed.weight", "head.weight"):
            return self.embedding
        if _ATTENTION.match(name):
            return self.attention
        if _DENSE.match(name):
            return self.dense
        return self.tower if _LINEAR.match(name) else Kind.PLAIN

    def kind_for(self, name: str, shape: tuple[int, ...]) -> Kind:
        kind = self.kind(name)
        code = self.code(kind)
        if code and (shape[-2] % code.row_multiple or shape[-1] % 16):
            return Kind.INT8
        return Kind.INT8 if kind is Kind.INT6 and shape[-1] % 4 else kind

    def code(self, kind: Kind) -> TrellisCode | None:
        return {Kind.TWO: self.two, Kind.FOUR: self.four}.get(kind)

    def num_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of one stored parameter, scales included."""
        kind, size = self.kind_for(name, shape), prod(shape)
        bits = {Kind.PLAIN: 32, Kind.INT8: 8, Kind.INT6: 6, Kind.FOUR: 4, Kind.TWO: 2}[kind]
        scales = 0 if kind is Kind.PLAIN else 2 * (size // shape[-1])
        return size * bits // 8 + scales


def build_plan(
    bits: str,
    config: ModelConfig,
    two: TrellisCode = LCC2_12,
    embedding_bits: int = 8,
    attention_bits: int = 4,
) -> BitPlan:
    """The preset of that name; `auto` begins as `2`. `embedding_bits` are of embeddings and head, 8 or 6.

    `attention_bits` are 4 or 8.

    ConfigError for any other, or a code not of 2 bits.
    """
    if embedding_bits not in (8, 6):
        raise ConfigError(f"embeddings of {embedding_bits} bits; there are 8 and 6", bits=embedding_bits)
    if attention_bits not in (4, 8):
        raise ConfigError(f"attention of {attention_bits} bits; there are 4 and 8", bits=attention_bits)
    if two.bits != 2:
        raise ConfigError(f"{two.name} is a code of {two.bits} bits; the 2-bit codes are named lcc2-*")
    layers = [index for index, has_experts in enumerate(config.expert_layers) if has_experts]
    raised = {"2": [], "auto": [], "2.3": [*layers[:1], *layers[-1:]], "4": layers}
    if bits not in raised:
        raise ConfigError(f"--bits {bits!r}; there are {', '.join(PRESETS)}", bits=bits)
    banks = {f"{layer}.{modality}" for layer in raised[bits] for modality in ("text", "vision")}
    if bits == "2.3" and layers:
        banks.discard(f"{layers[-1]}.vision")  # its output reaches no text token
    embedding = Kind.INT8 if embedding_bits == 8 else Kind.INT6
    attention = Kind.FOUR if attention_bits == 4 else Kind.INT8
    return BitPlan(bits, frozenset(banks), embedding, attention, two=two)


def raise_banks(
    plan: BitPlan, shapes: Mapping[str, tuple[int, ...]], costs: Mapping[str, float], budget_bytes: int
) -> BitPlan:
    """Raises banks to 4 bits while the budget lasts, by the `costs` saved per byte.

    `costs[bank]` is what 2 bits cost there, in any one unit; at 4 bits 1/14 of it is left (the ratio of the
    codes' distortions). With one step a bank, going by the ratio is the Lagrangian solution; where a bank no
    longer fits, smaller ones still may. ConfigError where the budget does not hold everything at its least.
    """
    total = least_bytes(plan, shapes, budget_bytes)
    extra = {bank: _extra_bytes(plan, shapes, bank) for bank in costs}
    raised = set(plan.raised)
    for bank in sorted(costs, key=lambda bank: -costs[bank] / max(extra[bank], 1)):
        if total + extra[bank] <= budget_bytes and costs[bank] > 0:
            raised.add(bank)
            total += extra[bank]
    return replace(plan, raised=frozenset(raised))


def least_bytes(plan: BitPlan, shapes: Mapping[str, tuple[int, ...]], budget_bytes: int) -> int:
    """Bytes of the plan as it is; ConfigError where that is above the budget."""
    total = sum(plan.num_bytes(name, shape) for name, shape in shapes.items())
    if total > budget_bytes:
        raise ConfigError(
            f"a budget of {budget_bytes:,} bytes; the least this plan can do is {total:,}", needed=total
        )
    return total


def _extra_bytes(plan: BitPlan, shapes: Mapping[str, tuple[int, ...]], bank: str) -> int:
    more = replace(plan, raised=frozenset({bank}))
    own = {name: s for name, s in shapes.items() if (m := _BANK.match(name)) and f"{m[1]}.{m[2]}" == bank}
    return sum(more.num_bytes(name, s) - plan.num_bytes(name, s) for name, s in own.items())
