"""Ids to text as they come, never cutting a character in two.

One character may take several tokens (bytes that no piece covers); what is incomplete waits for the next.
"""

from __future__ import annotations

import codecs

from duomo.processing.tokenizer import Tokenizer


class Detokenizer:
    """`add` ids, get the text that is certain; `finish` gives the rest."""

    def __init__(self, tokenizer: Tokenizer, *, keep: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._keep = keep  # control tokens whose names are part of the text, such as </think>
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        if self._tokenizer.is_silent(token_id) and token_id not in self._keep:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
