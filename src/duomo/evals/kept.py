"""Answers that outlive the run that made them: one line of JSON each, in a file of their checkpoint's own.

The file's name holds the hash of the weights and of the questions, so answers are never read as another
model's or to another question. A line cut short by a kill is left out and asked again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path


class KeptAnswers:
    """`kept[number]` is the answer to that question; `number in kept` whether there is one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[int, str] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    number, answer = json.loads(line)
                except ValueError:
                    continue
                self._found[number] = answer

    @classmethod
    def of(cls, folder: Path, checkpoint: Path, questions: str) -> KeptAnswers:
        """Those of a checkpoint's weights to the questions of that hash, in `folder`."""
        digest = blake2b(digest_size=8)
        for file in sorted(checkpoint.glob("*.safetensors")):
            digest.update(file.read_bytes())
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / f"{digest.hexdigest()}-{questions[:16]}.jsonl")

    def __contains__(self, number: int) -> bool:
        return number in self._found

    def __getitem__(self, number: int) -> str:
        return self._found[number]

    def add(self, answers: Mapping[int, str]) -> None:
        """Kept and written."""
        self._found.update(answers)
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(
                "\n" + json.dumps([number, answer], ensure_ascii=False) for number, answer in answers.items()
            )
