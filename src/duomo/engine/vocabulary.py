"""What the engine knows of the vocabulary: the bytes of every id, which ids end an answer or its thinking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from duomo.errors import GrammarError
from duomo.processing.tokenizer import Tokenizer


@dataclass
class Vocabulary:
    """`think_end` is None for a model that does not think."""

    tokens: Sequence[bytes]
    eos_ids: tuple[int, ...]
    think_end: int | None
    special_ids: frozenset[int] = frozenset()
    encode: Callable[[str], list[int]] = field(default=lambda text: [])

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        special = frozenset(i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i))
        end = tokenizer.find_special("</think>")
        return cls(tokens, tokenizer.eos_ids, end, special, tokenizer.encode)

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """llguidance's view of it, made when the first constraint is asked for."""
        import llguidance

        if not self.eos_ids:
            raise GrammarError("this vocabulary has no token that ends an answer; constraints need one")
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_ForGrammar(self)))


class _ForGrammar:
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = sorted(vocabulary.special_ids)
        # An id without bytes would be allowed anywhere; a name that no text has keeps it out.
        self.tokens = [token or f"<|unused_{i}|>".encode() for i, token in enumerate(vocabulary.tokens)]
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode() if isinstance(text, bytes) else text)
