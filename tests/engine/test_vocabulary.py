"""What the engine asks of a vocabulary that is not held as a list."""

from __future__ import annotations

import pytest

from duomo.engine.vocabulary import Vocabulary
from duomo.llm import embedded_folder
from duomo.processing.tokenizer import Tokenizer


def test_tokens_are_the_tokenizers_without_a_list_of_them():
    tokenizer = Tokenizer.load(embedded_folder())
    vocabulary = Vocabulary.of(tokenizer)
    expected = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert list(vocabulary.tokens) == expected
    assert len(vocabulary.tokens) == tokenizer.vocab_size
    assert vocabulary.tokens[-1] == expected[-1]
    assert vocabulary.tokens[3:9:2] == expected[3:9:2]
    with pytest.raises(IndexError):
        vocabulary.tokens[tokenizer.vocab_size]
    assert vocabulary.special_ids == {i for i in range(len(expected)) if tokenizer.is_special(i)}
    assert set(vocabulary.eos_ids) <= vocabulary.special_ids
