"""A tokenizer for a synthetic checkpoint: the embedded model's pieces under ERNIE's size and control ids.

Random weights have no words, but `ask`, `chat` and `serve` need a way in and out. Ids without a piece read as
`<12345>`, so that an answer shows what it is: numbers drawn by chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from duomo.model import ModelConfig

_EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny" / "tokenizer.json"


def write_placeholder_tokenizer(folder: Path, config: ModelConfig) -> bool:
    """Writes tokenizer.json; False where the vocabulary is too small for the pieces and control tokens."""
    fields: dict[str, Any] = json.loads(_EMBEDDED.read_text(encoding="utf-8"))
    known: dict[str, int] = fields["model"]["vocab"]
    first_control = known["<|end_of_sentence|>"]
    control = [name for name, token_id in known.items() if token_id >= first_control]
    places = dict(zip(control, _places(control, config), strict=True))
    pieces = {name: token_id for name, token_id in known.items() if token_id < first_control}
    if len(pieces) > min(places.values()) or max(places.values()) >= config.vocab_size:
        return False
    taken = {*pieces.values(), *places.values()}
    fillers = {f"<{index}>": index for index in range(config.vocab_size) if index not in taken}
    fields["model"]["vocab"] = {**pieces, **places, **fillers}
    for token in fields["added_tokens"]:
        token["id"] = places.get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    return True


def _places(control: list[str], config: ModelConfig) -> list[int]:
    """ERNIE's order, in two runs of ids: one around the picture's placeholder, one around its start."""
    patch, start = control.index("<|IMAGE_PLACEHOLDER|>"), control.index("<|IMAGE_START|>")
    turn = control.index("<|LOC_BEGIN|>")
    return [
        config.ids.image_patch + index - patch if index < turn else config.ids.image_start + index - start
        for index in range(len(control))
    ]
