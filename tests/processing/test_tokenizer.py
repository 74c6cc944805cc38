"""Both kinds of vocabulary: control tokens by name, typed ones as text, bytes of ids, damaged files."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.errors import CheckpointError, TemplateError
from duomo.processing.tokenizer import Tokenizer

NAMES = [
    "</s>",
    "<s>",
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<think>",
    "</think>",
    "<|IMAGE_START|>",
]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "User: What is this? Assistant: a picture of a magpie",
    "你好，请给我看一张图片。",
    "Pack my box with five dozen liquor jugs 0123456789 <> / | think",
]


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Baidu ships it: control tokens inside the model and beside it, thinking tags as symbols."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 50),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<|begin_of_sentence|>"],
        user_defined_symbols=["<|end_of_sentence|>", "<think>", "</think>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps({"<|IMAGE_START|>": 500}), encoding="utf-8")
    beside = {"501": {"content": "<|IMAGE_PLACEHOLDER|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": beside}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session", params=["json", "sentencepiece"])
def either(request: pytest.FixtureRequest, vocabulary: Path, sentencepiece_folder: Path) -> Tokenizer:
    return Tokenizer.load(vocabulary if request.param == "json" else sentencepiece_folder)


def test_every_name_has_an_id_of_its_own(either: Tokenizer) -> None:
    ids = [either.special_id(name) for name in NAMES]
    assert len(set(ids)) == len(NAMES)
    assert all(either.is_special(i) and i < either.vocab_size for i in ids)
    assert either.eos_ids == (either.special_id("</s>"), either.special_id("<|end_of_sentence|>"))


def test_ids_are_looked_up(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_folder)
    assert tokenizer.special_id("<|IMAGE_START|>") == 500
    assert tokenizer.special_id("<|IMAGE_PLACEHOLDER|>") == 501
    assert tokenizer.vocab_size == 502
    with pytest.raises(TemplateError, match="no control token <nothing>"):
        tokenizer.special_id("<nothing>")


@pytest.mark.parametrize("name", [*NAMES, "<|IMAGE_PLACEHOLDER|>", "<tool_call>", "<|LOC_0|>"])
def test_a_typed_name_stays_text(either: Tokenizer, name: str) -> None:
    for text in (name, f"say {name}{name} now", name * 3, f"<{name}>"):
        ids = either.encode(text)
        assert not any(either.is_special(i) for i in ids)
        assert either.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([*NAMES, "<", ">", "think"]), st.text(max_size=8)), max_size=6).map(
        "".join
    )
)
def test_any_text_comes_back_without_control_tokens(either: Tokenizer, text: str) -> None:
    text = text.replace("▁", "")  # SentencePiece's own sign for a blank
    ids = either.encode(text)
    assert not any(either.is_special(i) for i in ids)
    if "\0" not in text:
        assert either.decode(ids) == text
    assert b"".join(map(either.token_bytes, ids)).decode("utf-8", "replace") == either.decode(ids)


def test_half_a_surrogate_pair_is_replaced(either: Tokenizer) -> None:
    assert "\ufffd" in either.decode(either.encode("a\ud83d b"))


def test_bytes_of_ids(either: Tokenizer) -> None:
    assert b"".join(map(either.token_bytes, either.encode(" é🙂"))) == " é🙂".encode()
    assert either.token_bytes(either.special_id("</think>")) == b"</think>"
    assert either.token_bytes(either.vocab_size + 100) == b""


def test_decode_may_keep_control_tokens(either: Tokenizer) -> None:
    ids = [*either.encode("a"), either.special_id("</think>"), *either.encode("b")]
    assert either.decode(ids) == "ab"
    assert either.decode(ids, skip_special=False) == "a</think>b"


def test_names_not_marked_special_are_control_tokens_all_the_same(vocabulary: Path, tmp_path: Path) -> None:
    fields = json.loads((vocabulary / "tokenizer.json").read_text(encoding="utf-8"))
    for token in fields["added_tokens"]:
        token["special"] = token["content"] not in ("<think>", "</think>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.is_special(tokenizer.special_id("</think>"))
    assert not any(tokenizer.is_special(i) for i in tokenizer.encode("a</think>b"))


def test_many_threads_at_once(either: Tokenizer) -> None:
    texts = [f"{sentence} {number}" for number in range(50) for sentence in SENTENCES]
    alone = [either.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(either.encode, texts)) == alone


def test_byte_level_vocabularies_are_refused_not_misread(vocabulary: Path, tmp_path: Path) -> None:
    fields = json.loads((vocabulary / "tokenizer.json").read_text(encoding="utf-8"))
    fields["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (None, b"", "no tokenizer in"),
        ("tokenizer.json", b"", "cannot be read"),
        ("tokenizer.json", b'{"model"', "cannot be read"),
        ("tokenizer.json", b"[]", "cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "no such"}}', "cannot be read"),
        ("tokenizer.model", b"not a model", "cannot be read"),
        ("tokenizer.model", b"", "cannot be read"),
    ],
)
def test_a_damaged_folder_says_so_in_one_line(
    tmp_path: Path, name: str | None, data: bytes, complaint: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
