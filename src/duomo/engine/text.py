"""From an answer's ids to what people read: reasoning, content and tool calls, streamed and whole alike.

Only what needs ids is here: `</think>` is known by its id, so text that merely spells it is text; stop
strings are cut; no character is split. What tags mean is `processing.reasoning`'s. Whole is the sum of
the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from duomo.engine.stops import StopMatcher
from duomo.processing.detokenize import Detokenizer
from duomo.processing.reasoning import TAGS, AnswerParser, AnswerPiece, ParserName
from duomo.processing.tokenizer import Tokenizer


class AnswerText:
    """`add` ids as they come, `finish` at the end; the pieces put together are the whole answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: ParserName,
        is_thinking: bool,
        stops: Sequence[str] = (),
        has_tools: bool = False,
        name: str = "call",
    ) -> None:
        self._tokenizer = tokenizer
        self._think_end = tokenizer.find_special("</think>")
        tags = [tokenizer.find_special(tag) for tag in TAGS]
        self._keep = frozenset(tag for tag in tags if tag is not None)
        self._decoder = Detokenizer(tokenizer, keep=self._keep)
        self._is_thinking = is_thinking and self._think_end is not None
        self._stops, self._is_opening = StopMatcher(stops), self._is_thinking
        self._parser = AnswerParser(
            parser,
            is_thinking=self._is_thinking,
            has_tools=has_tools,
            call_name=name,
            spells_thinking=False,
        )

    def add(self, ids: Sequence[int]) -> AnswerPiece:
        piece = AnswerPiece()
        for token in ids:
            if self._is_thinking and token == self._think_end:
                self._feed(piece, self._decoder.finish())
                piece.add(self._parser.end_thinking())
                self._decoder = Detokenizer(self._tokenizer, keep=self._keep)
                self._is_thinking = False
            else:
                self._feed(piece, self._decoder.add(token))
        return piece

    def finish(self) -> AnswerPiece:
        piece = AnswerPiece()
        self._feed(piece, self._decoder.finish())
        piece.add(self._parser.feed(self._stops.finish()))
        piece.add(self._parser.finish())
        return piece

    def _feed(self, piece: AnswerPiece, text: str) -> None:
        if not text:
            return
        if not self._is_thinking:
            if self._is_opening:  # newlines after the thinking are the template's, and stop nothing
                text = text.lstrip("\n")
                self._is_opening = not text
            text = self._stops.feed(text)
        piece.add(self._parser.feed(text))
