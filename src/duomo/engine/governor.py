"""How long a model may think: a budget kept to the token, a way out of loops, and "answer now".

The governor speaks before the sampler does: where it names a token, that token is the next one. Contract:
at most N tokens stand between `<think>` and `</think>`; N = 0 closes at once; an end of answer drawn inside
the block becomes `</think>`, so that an answer always follows; a wrap-up sentence counts within the N.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

MAX_PERIOD = 64
NUM_REPEATS = 6
MIN_LOOP_TOKENS = 48


class Governor:
    def __init__(
        self, is_thinking: bool, think_end: int | None, budget: int | None, wrap_up: Sequence[int] = ()
    ) -> None:
        self.is_thinking = is_thinking and think_end is not None
        self.num_thought = 0
        self.cause = ""  # why the block was closed from outside: budget, loop, answer_now, end
        self._think_end = -1 if think_end is None else think_end
        self._budget = budget
        self._wrap_up = tuple(wrap_up) if budget is None or len(wrap_up) < budget else ()
        self._forced: deque[int] = deque()
        self._thoughts: list[int] = []

    def next_token(self) -> int | None:
        """The token that must come next, if one must."""
        if not self.is_thinking:
            return None
        if not self._forced and self._budget is not None:
            left = self._budget - self.num_thought
            if left <= len(self._wrap_up):
                self._close("budget")
        if not self._forced and is_looping(self._thoughts):
            self._close("loop")
        return self._forced[0] if self._forced else None

    def replace(self, token: int, eos_ids: Sequence[int]) -> int:
        """An end of answer inside the thinking ends the thinking."""
        if self.is_thinking and token in eos_ids:
            self.cause = self.cause or "end"
            return self._think_end
        return token

    def accept(self, token: int) -> None:
        if not self.is_thinking:
            return
        if self._forced and self._forced[0] == token:
            self._forced.popleft()
        if token == self._think_end:
            self.is_thinking = False
            self._thoughts = []
        else:
            self.num_thought += 1
            self._thoughts.append(token)

    def answer_now(self) -> None:
        if self.is_thinking:
            self._forced.clear()
            self._forced.append(self._think_end)
            self.cause = "answer_now"

    def _close(self, cause: str) -> None:
        room = None if self._budget is None else self._budget - self.num_thought
        words = self._wrap_up if room is None or room >= len(self._wrap_up) else ()
        self._forced.extend((*words, self._think_end))
        self.cause = cause


def is_looping(tokens: Sequence[int]) -> bool:
    """The last tokens are one phrase of up to 64 tokens, said 6 times and for at least 48 tokens."""
    for period in range(1, MAX_PERIOD + 1):
        length = max(NUM_REPEATS * period, MIN_LOOP_TOKENS)
        if length > len(tokens):
            if period * NUM_REPEATS > len(tokens):
                return False
            continue
        if tokens[-1] == tokens[-1 - period] and all(
            tokens[i] == tokens[i - period] for i in range(len(tokens) - length + period, len(tokens))
        ):
            return True
    return False


def needs_thinking(question: str, num_media: int, has_tools: bool) -> bool:
    """The rule of `auto`, cheap and stated: think where the question has to be worked out.

    Yes for arithmetic and words of reasoning, for several pictures, and for long questions without a
    constraint on their form; no otherwise. Tools alone do not call for thinking.
    """
    text = question.lower()
    digits = sum(character.isdigit() for character in text)
    has_sum = digits >= 2 and any(sign in text for sign in "+*/×÷=<>%")
    has_word = any(word in text for word in _REASONING_WORDS)
    return has_sum or has_word or num_media > 1 or (len(text) > 400 and not has_tools)


_REASONING_WORDS = (
    "why", "how many", "how much", "prove", "explain", "step by step", "calculate", "compute", "solve",
    "compare", "difference", "sum", "add", "total", "reason", "plan", "derive", "if ",
    "为什么", "证明", "解释", "计算", "求", "比较", "多少", "几", "总", "加", "推理", "一步", "如果",
)  # fmt: skip
