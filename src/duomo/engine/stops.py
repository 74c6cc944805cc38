"""Stop strings, found across the borders of tokens and never shown.

`feed` takes text as it becomes certain and returns what may be shown now: whatever could still be the
beginning of a stop string waits. The engine and the facade run the same object over the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._waiting = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        self._waiting += text
        hits = [(self._waiting.find(stop), stop) for stop in self._stops if stop in self._waiting]
        if hits:
            place, self.found = min(hits)
            shown, self._waiting = self._waiting[:place], ""
            return shown
        held = max(overlap(self._waiting, stop) for stop in self._stops)
        cut = len(self._waiting) - held
        shown, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return shown

    def finish(self) -> str:
        """The rest, when no more text comes."""
        rest, self._waiting = self._waiting, ""
        return rest


def overlap(text: str, stop: str) -> int:
    """The longest end of the text that begins the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
