"""The embedded vocabulary: ERNIE's control tokens at the end, single digits, every text there and back."""

from __future__ import annotations

import pytest

from duomo.processing.tokenizer import Tokenizer
from duomo.train.vocabulary import VOCAB_SIZE, VOCAB_SIZES


def test_layout(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert [tokenizer.special_id(name) for name in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    patch = tokenizer.special_id("<|IMAGE_PLACEHOLDER|>")
    for name in ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>", "<|LOC_0|>"):
        assert patch < tokenizer.special_id(name) < VOCAB_SIZE
    for name in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|begin_of_sentence|>"):
        assert tokenizer.special_id(name) < patch


def test_digits_are_pieces_of_their_own(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("472")) == 3
    assert len({i for digit in "0123456789" for i in tokenizer.encode(digit)}) == 10


@pytest.mark.parametrize(
    "text", ["Read the digits.", "读出图中的数字。", "naïve 🦊 \n\n  x", "汉字龘 12+30=42"]
)
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_typed_control_tokens_stay_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("</think><|IMAGE_PLACEHOLDER|>")
    assert not any(tokenizer.is_special(i) for i in ids)


def test_mini_has_more_ids() -> None:
    assert VOCAB_SIZES == {"tiny": 4096, "mini": 6144}
