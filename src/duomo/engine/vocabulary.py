"""What the engine knows of the vocabulary: the bytes of every id, which ids end an answer or its thinking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

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
        special = frozenset(tokenizer.specials.values())
        end = tokenizer.find_special("</think>")
        return cls(_TokenBytes(tokenizer), tokenizer.eos_ids, end, special, tokenizer.encode)

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """llguidance's view of it, made when the first constraint is asked for."""
        import llguidance

        if not self.eos_ids:
            raise GrammarError("this vocabulary has no token that ends an answer; constraints need one")
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_ForGrammar(self)))


class _TokenBytes(Sequence[bytes]):
    """Asked of the tokenizer each time: a list of the 28B's 103,424 is 6 MB and a tenth of a second."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        chosen = range(len(self))[index]  # an IndexError past the end, as of a list
        if isinstance(chosen, range):
            return [self._tokenizer.token_bytes(i) for i in chosen]
        return self._tokenizer.token_bytes(chosen)


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
