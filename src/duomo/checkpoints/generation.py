"""How a checkpoint says that its answers are drawn: generation_config.json, in the engine's words.

Precedence, everywhere: what a request says, then this file, then `SamplingParams`' own defaults. Ends of an
answer are the tokenizer's; lengths and everything about beams are not ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from duomo.errors import CorruptFile

_RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1 << 24),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
}


def load_sampling(folder: Path) -> dict[str, float]:
    """Sampling fields that the file states; {} without a file. `do_sample: false` is temperature 0.

    CorruptFile if it is no JSON object or a value is none that can be drawn with.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CorruptFile(f"{path} is no JSON object")
    found: dict[str, float] = {}
    for name, (low, high) in _RANGES.items():
        value = fields.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise CorruptFile(f"{path} has {name} {value!r}; it must be between {low:g} and {high:g}")
        found[name] = int(value) if name == "top_k" else float(value)
    if fields.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
