"""Rewards that can be checked: an answer against the row's own, by rule, 0 to 1. No model judges here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from duomo.errors import TrainingError

Reward = Callable[[str, str], float]
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def exact(answer: str, wanted: str) -> float:
    return float(answer.strip() == wanted.strip())


def number(answer: str, wanted: str) -> float:
    """The last number of the answer is the last of the wanted one."""
    found, right = _NUMBER.findall(answer), _NUMBER.findall(wanted)
    return float(bool(found and right) and abs(float(found[-1]) - float(right[-1])) < 1e-9)


def contains(answer: str, wanted: str) -> float:
    return float(wanted.strip() in answer)


def valid_json(answer: str, wanted: str) -> float:
    """Half for being JSON, all for being the same value."""
    try:
        found = json.loads(answer)
    except ValueError:
        return 0.0
    try:
        return 1.0 if found == json.loads(wanted) else 0.5
    except ValueError:
        return 0.5


REWARDS: dict[str, Reward] = {"exact": exact, "number": number, "contains": contains, "json": valid_json}


def reward_named(name: str) -> Reward:
    if name not in REWARDS:
        raise TrainingError(f"no reward {name!r}; there are {', '.join(REWARDS)}", reward=name)
    return REWARDS[name]
