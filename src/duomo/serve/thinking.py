"""The thinking switch in every spelling that clients use, with one precedence and one effective value.

Switches, which must agree when several are given (else 400), in the order named in `decided_by`:
  1. thinking: "on" | "off" | "auto" | true | false | N | {"type": "enabled" | "disabled" | "adaptive"}
  2. chat_template_kwargs.enable_thinking, .thinking, .options.thinking_mode ("open" | "close" | "auto")
  3. enable_thinking
  4. reasoning.enabled
  5. metadata.enable_thinking
An effort (reasoning_effort, reasoning.effort) decides only where no switch does, and gives a budget only
where none is given; then a budget alone means on; then the server's --thinking. Budgets must agree, too.
With thinking not off, a max_tokens and no budget, the budget is 0.8 of max_tokens, so that an answer follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from duomo.serve.problems import Problem
from duomo.serve.schema import ChatRequest, ThinkingSwitch

Mode = Literal["on", "off", "auto"]
V = TypeVar("V")

EFFORT_TOKENS: dict[str, int | None] = {
    "minimal": 128, "low": 512, "medium": 2048, "high": 8192, "xhigh": None,
}  # fmt: skip
_SHARE_FOR_THINKING = 0.8  # of max_tokens, FastDeploy's rule for this model


@dataclass(frozen=True, slots=True)
class Thinking:
    mode: Mode
    budget: int | None
    decided_by: str


def resolve(
    request: ChatRequest, default: Mode, default_budget: int | None, max_tokens: int | None
) -> Thinking:
    """The effective mode and budget, or a 400 when two fields contradict each other."""
    budget, budget_name = _agreed(_budgets(request))
    mode, decided_by = _agreed(_switches(request))
    effort, effort_name = _agreed(_efforts(request))
    if mode is None and effort is not None:
        mode, decided_by = ("off" if effort == "none" else "on"), effort_name
    if mode is None and budget is not None:
        mode, decided_by = ("off" if budget == 0 else "on"), budget_name
    if mode is None:
        mode, decided_by = default, "server"
    if mode == "off":
        return Thinking("off", None, decided_by)
    if budget == 0:
        raise _contradiction(decided_by, mode, budget_name, 0)
    if budget is None:
        budget = EFFORT_TOKENS.get(effort or "") if effort else default_budget
    if budget is None and max_tokens is not None:
        budget = max(1, int(max_tokens * _SHARE_FOR_THINKING))
    return Thinking("auto" if mode == "auto" else "on", budget, decided_by)


def _switches(request: ChatRequest) -> list[tuple[str, Mode]]:
    kwargs = request.chat_template_kwargs
    options = kwargs.options if kwargs else None
    named: list[tuple[str, object]] = [
        ("thinking", _of_field(request.thinking)),
        ("chat_template_kwargs.enable_thinking", kwargs.enable_thinking if kwargs else None),
        ("chat_template_kwargs.thinking", kwargs.thinking if kwargs else None),
        ("chat_template_kwargs.options.thinking_mode", options.thinking_mode if options else None),
        ("enable_thinking", request.enable_thinking),
        ("reasoning.enabled", request.reasoning.enabled if request.reasoning else None),
        ("metadata.enable_thinking", _of_metadata(request)),
    ]
    return [(name, _WORDS[value]) for name, value in named if value is not None]


_WORDS: dict[object, Mode] = {
    True: "on", False: "off", "on": "on", "off": "off", "auto": "auto", "open": "on", "close": "off",
    "enabled": "on", "disabled": "off", "adaptive": "auto",
}  # fmt: skip


def _of_field(value: object) -> object:
    if isinstance(value, ThinkingSwitch):
        return value.type
    if isinstance(value, int) and not isinstance(value, bool):
        return value > 0
    return value


def _of_metadata(request: ChatRequest) -> object:
    value = (request.metadata or {}).get("enable_thinking")
    if value is None or isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return bool(value == "true")
    raise Problem(
        400,
        "invalid_value",
        "metadata.enable_thinking must be true or false",
        param="metadata.enable_thinking",
    )


def _budgets(request: ChatRequest) -> list[tuple[str, int]]:
    thinking = request.thinking
    is_number = isinstance(thinking, int) and not isinstance(thinking, bool)
    named = [
        ("thinking", thinking if is_number else None),
        ("thinking.budget_tokens", thinking.budget_tokens if isinstance(thinking, ThinkingSwitch) else None),
        ("thinking_budget", request.thinking_budget),
        ("thinking_token_budget", request.thinking_token_budget),
        ("thinking_budget_tokens", request.thinking_budget_tokens),
        ("reasoning_max_tokens", request.reasoning_max_tokens),
        ("reasoning.max_tokens", request.reasoning.max_tokens if request.reasoning else None),
    ]
    return [(name, value) for name, value in named if isinstance(value, int)]


def _efforts(request: ChatRequest) -> list[tuple[str, str]]:
    reasoning = request.reasoning.effort if request.reasoning else None
    named = [("reasoning_effort", request.reasoning_effort), ("reasoning.effort", reasoning)]
    return [(name, value) for name, value in named if value is not None]


def _agreed(named: Sequence[tuple[str, V]]) -> tuple[V | None, str]:
    """The value all fields give and the first that gave it; (None, "") where none did."""
    for name, value in named[1:]:
        if value != named[0][1]:
            raise _contradiction(*named[0], name, value)
    return (named[0][1], named[0][0]) if named else (None, "")


def _contradiction(first: str, value: object, second: str, other: object) -> Problem:
    said = f"{first} says {value} and {second} says {other}; give one of them, or the same in both"
    return Problem(400, "contradictory_thinking", said, param=second)
