"""Drafts by n-gram lookup: what followed the last few tokens the last time they were said.

Answers about documents copy a lot, and a step that checks five tokens costs little more than one. A draft is
kept only where the sampler draws the very same token from the model's own logits, so answers do not change.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_NGRAM = 4
MIN_NGRAM = 2
WINDOW = 4096


def propose(ids: Sequence[int], num_drafts: int) -> list[int]:
    """Up to `num_drafts` tokens, from the latest earlier place that ends like `ids`; [] where none does."""
    if num_drafts <= 0:
        return []
    tail = list(ids[-WINDOW:])
    for size in range(min(MAX_NGRAM, len(tail) - 1), MIN_NGRAM - 1, -1):
        pattern = tail[-size:]
        last = pattern[-1]
        for end in range(len(tail) - 2, size - 2, -1):
            if tail[end] == last and tail[end - size + 1 : end + 1] == pattern:
                return tail[end + 1 : end + 1 + num_drafts]
    return []
