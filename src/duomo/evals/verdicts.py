"""When an answer is right, by kind of question. Exact match is the rule; the exceptions are named here.

Boxes overlap by half or more (IoU), shares of positive nuclei lie within ten points, JSON and tool calls are
equal as data. A number is never accepted for being near in any other kind.
"""

from __future__ import annotations

import json
import re
from typing import Any

WITHIN_POINTS = 10
MIN_OVERLAP = 0.5
SHARES = ("nuclei/share", "nuclei/share thinking", "nuclei/area real")
DATA = ("text/json", "text/tool call")


def is_right(kind: str, wanted: str, answer: str) -> bool:
    """Whether `answer` counts as `wanted`."""
    if kind == "places/box":
        return overlap(wanted, answer) >= MIN_OVERLAP
    if kind in SHARES:
        found, truth = percent(answer), percent(wanted)
        return found is not None and truth is not None and abs(found - truth) <= WITHIN_POINTS
    if kind in DATA:
        return parsed(answer) is not None and parsed(answer) == parsed(wanted)
    return answer == wanted


def percent(text: str) -> int | None:
    found = re.fullmatch(r"(\d{1,3})%", text)
    return int(found.group(1)) if found else None


def parsed(text: str) -> Any:
    """The JSON value, or None where there is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def overlap(one: str, other: str) -> float:
    """Intersection over union of two boxes in `<|LOC_x|>` tokens; 0 where one is no box."""
    boxes = [[int(edge) for edge in re.findall(r"<\|LOC_(\d+)\|>", text)] for text in (one, other)]
    if any(len(box) != 4 or box[0] >= box[2] or box[1] >= box[3] for box in boxes):
        return 0.0
    a, b = boxes
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
    return shared / (sum(areas) - shared)
