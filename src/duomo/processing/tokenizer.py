"""Text to ids and back, from `tokenizer.json` or a SentencePiece `tokenizer.model`.

Control tokens are reached by name only (`special_id`): text is encoded with them switched off, so that
what a user types never becomes one. Ids are looked up in the vocabulary and never assumed, since the
embedded model has ERNIE's names in a vocabulary of 4,096.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from duomo.errors import CheckpointError, TemplateError

_SPACE = "▁"  # how SentencePiece writes a blank


class _Vocabulary(Protocol):
    """What the two libraries have in common, as duomo needs it."""

    size: int

    def encode(self, text: str) -> list[int]: ...
    def piece(self, token_id: int) -> str: ...
    def find(self, piece: str) -> int | None: ...
    def specials(self) -> dict[str, int]: ...


class Tokenizer:
    """Ids of plain text, control tokens by name, and the bytes of every id."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._specials = vocabulary.specials()
        self._special_names = {token_id: name for name, token_id in self._specials.items()}
        # Places in a picture are part of an answer; all other control tokens are silent in its text.
        self._silent = {i for name, i in self._specials.items() if not name.startswith("<|LOC_")}
        self._forbidden = {i for name, i in self._specials.items() if name != "<unk>" and len(name) > 1}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Opens a checkpoint's tokenizer; CheckpointError if there is none or it is damaged."""
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(_JsonVocabulary(folder / "tokenizer.json"))
            if (folder / "tokenizer.model").is_file():
                return cls(_SentencePieceVocabulary(folder))
        except Exception as error:  # both libraries raise plain Exceptions and RuntimeErrors
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {reason}") from error
        raise CheckpointError(f"no tokenizer in {folder}: expected tokenizer.json or tokenizer.model")

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def specials(self) -> dict[str, int]:
        """Control tokens by name."""
        return dict(self._specials)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_names

    def is_silent(self, token_id: int) -> bool:
        """Whether a text leaves this id out: any control token but places (`<|LOC_12|>`)."""
        return token_id in self._silent

    def special_id(self, name: str) -> int:
        """The id of a control token; TemplateError if this vocabulary has none of that name."""
        found = self.find_special(name)
        if found is None:
            raise TemplateError(f"this tokenizer has no control token {name}", name=name)
        return found

    def find_special(self, name: str) -> int | None:
        found = self._specials.get(name)
        return self._vocabulary.find(name) if found is None else found

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. No control token comes out, whatever the text spells.

        A name that the vocabulary would still match (a SentencePiece symbol) is encoded in two halves; half a
        surrogate pair, which no vocabulary can spell, becomes U+FFFD.
        """
        if not text:
            return []
        ids = self._vocabulary.encode(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        if self._forbidden.isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in self._spelled(token_id)]

    def _spelled(self, token_id: int) -> list[int]:
        if token_id not in self._forbidden:
            return [token_id]
        name = self._special_names[token_id]
        return self.encode(name[:1]) + self.encode(name[1:])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes an id stands for; a control token's are those of its name."""
        if token_id in self._special_names:
            return self._special_names[token_id].encode()
        piece = self._vocabulary.piece(token_id)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids, without the silent ones. Bytes that form no character become U+FFFD."""
        kept = (i for i in ids if not (skip_special and i in self._silent))
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", errors="replace")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: `</s>`, and `<|end_of_sentence|>` for safety (spec 5.2)."""
        found = (self.find_special(name) for name in ("</s>", "<|end_of_sentence|>"))
        return tuple(token_id for token_id in found if token_id is not None)


class _JsonVocabulary:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        # A control token found in a text would be matched by the backend itself, so they are taken out of
        # the file's `added_tokens` before it is built: the vocabulary keeps the ids, texts their letters.
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "ByteLevel" in json.dumps([fields.get("pre_tokenizer"), fields.get("decoder")]):
            raise ValueError("its pieces are byte-level, and ERNIE's are text with a fallback to bytes")
        # Files in the wild mark <think> and the like as not special; here they are, all the same.
        added = fields.get("added_tokens", [])
        control = [token for token in added if token.get("special") or _is_control(token["content"])]
        self._specials = {token["content"]: int(token["id"]) for token in control}
        plain = {token["content"]: int(token["id"]) for token in added}
        fields["added_tokens"] = [token for token in added if token not in control]
        fields["post_processor"] = None
        self._backend = Backend.from_str(json.dumps(fields))
        self._added: dict[int, str] = {token_id: piece for piece, token_id in plain.items()}
        self.size = max([*self._backend.get_vocab().values(), *self._added]) + 1

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def piece(self, token_id: int) -> str:
        """Asked of the backend each time: 103,424 pieces once more would be 17 MB."""
        if token_id in self._added:
            return self._added[token_id]
        piece: str | None = self._backend.id_to_token(token_id) if 0 <= token_id < self.size else None
        return piece or ""

    def find(self, piece: str) -> int | None:
        found = self._backend.token_to_id(piece)
        return None if found is None else int(found)

    def specials(self) -> dict[str, int]:
        return self._specials


class _SentencePieceVocabulary:
    def __init__(self, folder: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._backend = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self._added = _added_tokens(folder)
        self._added_pieces = {token_id: piece for piece, token_id in self._added.items()}
        own = self._backend.get_piece_size()
        self._control = {
            self._backend.id_to_piece(i): i
            for i in range(own)
            if self._backend.is_control(i) or self._backend.is_unknown(i) or self._is_symbol(i)
        }
        self.size = max([own - 1, *self._added_pieces]) + 1

    def _is_symbol(self, token_id: int) -> bool:
        """One of ERNIE's names that a text would match whole, since its makers defined it as a symbol."""
        piece = self._backend.id_to_piece(token_id)
        return not self._backend.is_byte(token_id) and _is_control(piece)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text)  # type: ignore[no-any-return]

    def piece(self, token_id: int) -> str:
        if token_id in self._added_pieces:
            return self._added_pieces[token_id]
        if token_id >= self._backend.get_piece_size():
            return ""
        return self._backend.id_to_piece(token_id)

    def find(self, piece: str) -> int | None:
        found = int(self._backend.piece_to_id(piece))
        return found if self._backend.id_to_piece(found) == piece else None

    def specials(self) -> dict[str, int]:
        return {**self._control, **self._added}


def _is_control(piece: str) -> bool:
    """ERNIE's own names; tags of other kinds (tables in HTML, say) are text that answers are made of."""
    return re.fullmatch(r"</?(think|response|tool_(call|list|output))>|<\|[^|]+\|>", piece) is not None


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that Baidu and transformers keep beside `tokenizer.model`, by name."""
    found: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        found |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    if (folder / "tokenizer_config.json").is_file():
        fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        for token_id, token in fields.get("added_tokens_decoder", {}).items():
            found[token["content"]] = int(token_id)
    return {name: int(token_id) for name, token_id in found.items()}
