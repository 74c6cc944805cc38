"""Constraints on the answer, through llguidance: which tokens may come next.

A constraint is compiled when its request is added, so that a bad one is a GrammarError at once and not in
the middle of an answer. It starts after the thinking; the thinking itself is free.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from duomo.engine.request import Constraint
from duomo.engine.vocabulary import Vocabulary
from duomo.errors import GrammarError

# One spelling of JSON: free whitespace is where small models get lost for thousands of tokens.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """One answer's matcher. GrammarError if the constraint cannot be compiled."""

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
        from llguidance import LLMatcher

        self._vocab_size = len(vocabulary.tokens)
        self._eos_ids = vocabulary.eos_ids
        self._matcher = LLMatcher(vocabulary.grammar_tokenizer, _grammar(constraint), log_level=0)
        if not self._matcher.is_error() and not self._matcher.is_stopped():
            self._matcher.compute_bitmask()  # some are found to be too large only when they are used
        self._raise_if_broken(constraint.kind)

    @property
    def is_over(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V] true where a token may come next; the ends of an answer together or not at all."""
        if self._matcher.is_stopped():
            mask = np.zeros(self._vocab_size, dtype=np.bool_)
            mask[list(self._eos_ids)] = True
            return mask
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._raise_if_broken("constraint")
        return np.unpackbits(packed, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def advance(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def _raise_if_broken(self, what: str) -> None:
        if self._matcher.is_error():
            reason = str(self._matcher.get_error()).strip().splitlines()[0]
            raise GrammarError(f"the {what} cannot be used: {reason}", kind=what)


def _grammar(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    try:
        if constraint.kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(constraint.value, defaults=_JSON))
        if constraint.kind == "json_object":
            return str(LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON))
        if constraint.kind == "regex":
            return str(LLMatcher.grammar_from_regex(constraint.value))
        if constraint.kind == "grammar":
            return str(LLMatcher.grammar_from_lark(constraint.value))
        choices: Any = json.loads(constraint.value)
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise GrammarError("choice needs a list of at least one string")
        rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return str(LLMatcher.grammar_from_lark(f"start: {rule}"))
    except GrammarError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GrammarError(f"the {constraint.kind} cannot be used: {reason}", kind=constraint.kind) from error
