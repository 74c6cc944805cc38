"""Streamed pieces put together are the whole, and none ends inside a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.processing.detokenize import Detokenizer
from duomo.processing.tokenizer import Tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_ids_streamed_equal_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    byte_ids = st.integers(3, 258)  # where the vocabulary keeps its 256 bytes
    anything = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(st.one_of(byte_ids, anything), max_size=40))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_piece_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", "")
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_bytes_waits_for_its_last(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4
    assert streamed(tokenizer, ids) == ["", "", "", "🙂", ""]
    assert streamed(tokenizer, ids[:3]) == ["", "", "", "\ufffd"]


def test_blanks_are_where_they_were(tokenizer: Tokenizer) -> None:
    assert "".join(streamed(tokenizer, tokenizer.encode("  two  blanks "))) == "  two  blanks "


def test_control_tokens_are_silent_unless_kept(tokenizer: Tokenizer) -> None:
    tag = tokenizer.special_id("</think>")
    ids = [*tokenizer.encode("a"), tag, *tokenizer.encode("b")]
    assert "".join(streamed(tokenizer, ids)) == "ab"
    keeping = Detokenizer(tokenizer, keep=frozenset({tag}))
    assert "".join(map(keeping.add, ids)) + keeping.finish() == "a</think>b"


def test_places_in_a_picture_are_shown(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special_id(name) for name in ("<|LOC_BEGIN|>", "<|LOC_10|>", "<|LOC_END|>", "</s>")]
    assert "".join(streamed(tokenizer, ids)) == "<|LOC_BEGIN|><|LOC_10|><|LOC_END|>" == tokenizer.decode(ids)
