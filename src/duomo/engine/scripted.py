"""A model that says what it is told to: for tests of everything above the arithmetic, without weights.

A script maps the ids so far to the next id. Its logits are 10 for that id, 0 elsewhere (9 for `runner_up`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np

from duomo.engine.adapters import Adapters
from duomo.engine.runner import Floats
from duomo.engine.scheduler import Sequence, Step

Script = Callable[[Seq[int]], int]


class ScriptedRunner:
    def __init__(self, script: Script, vocab_size: int, step_seconds: float = 0.0) -> None:
        self.script, self.vocab_size, self.step_seconds = script, vocab_size, step_seconds
        self.adapters = Adapters()
        self.residency = None
        self.num_steps = self.num_tokens = 0
        self.media_encoded = 0

    def execute(self, step: Step, logit_starts: Seq[int]) -> list[Floats]:
        self.num_steps += 1
        if self.step_seconds:
            time.sleep(self.step_seconds)
        pieces = []
        for work, first in zip(step.works, logit_starts, strict=True):
            self.num_tokens += work.count
            ids = [*work.sequence.ids, *work.drafts]
            logits = np.zeros((work.count - first, self.vocab_size), dtype=np.float32)
            for row in range(work.count - first):
                logits[row, self.script(ids[: work.start + first + row + 1])] = 10.0
            pieces.append(logits)
        return pieces

    def forget(self, sequence: Sequence) -> None: ...

    def reset(self) -> None: ...

    def counters(self) -> dict[str, int]:
        return {"media_encoded": self.media_encoded}


def say(prompt_length: int, answer: Seq[int], end: int) -> Script:
    """After a prompt of that length: the answer's ids one by one, then `end`."""

    def script(ids: Seq[int]) -> int:
        place = len(ids) - prompt_length
        return answer[place] if 0 <= place < len(answer) else end

    return script


def always(answer: Seq[int], end: int, opening: int) -> Script:
    """After any prompt: the answer's ids one by one after the last `opening` id, then `end`."""

    def script(ids: Seq[int]) -> int:
        place = (
            len(ids) - 1 - max((i for i, token in enumerate(ids) if token == opening), default=len(ids) - 1)
        )
        return answer[place] if place < len(answer) else end

    return script
