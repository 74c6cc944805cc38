"""A row to what a model sees: the ids of the chat template, labels where an answer is, pictures as patches.

The words are those of `processing.template`, the very ones serving uses, so a model is asked in use what it
was trained on. A row that cannot be rendered (a damaged picture, a text too long) is a TrainingError with
its file and line. `Samples` renders each row once to know its length, and keeps what fits in KEEP_BYTES.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duomo.errors import Error, TrainingError
from duomo.model.config import ModelConfig
from duomo.processing.media import FetchRules, check_kind, fetch
from duomo.processing.messages import ImagePart, Message, Part, TextPart, VideoPart
from duomo.processing.prompt import Prompt
from duomo.processing.template import (
    IGNORE,
    LoadMedia,
    Rendering,
    TemplateDialect,
    load_media,
    loader_of,
    render_with_labels,
)
from duomo.processing.tokenizer import Tokenizer
from duomo.train.rows import Piece, Problem, Row, check_rows

KEEP_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `rejected` is the same with the answer not preferred, in a preference row."""

    prompt: Prompt
    labels: list[int]
    source: str
    rejected: Rendering | None = None
    thinks: bool = False  # the last answer begins with reasoning

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + (len(self.rejected.prompt.ids) if self.rejected else 0)

    @property
    def num_patches(self) -> int:
        """Through the tower; both answers of a pair bring their pictures."""
        count = sum(media.grid.num_patches for media in self.prompt.media)
        return 2 * count if self.rejected else count

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True, slots=True)
class Renderer:
    """What a checkpoint's training shares with its serving: tokenizer, dialect, sizes of pictures."""

    tokenizer: Tokenizer
    dialect: TemplateDialect = TemplateDialect.ERNIE_VL
    load: LoadMedia = load_media

    @classmethod
    def of(cls, folder: Path, config: ModelConfig) -> Renderer:
        dialect = TemplateDialect.ERNIE_VL if config.is_multimodal else TemplateDialect.ERNIE_TEXT
        return cls(Tokenizer.load(folder), dialect, loader_of(folder))

    def render(self, row: Row, folder: Path) -> Sample:
        """`folder` is where the row's relative paths begin. TrainingError names the row."""
        try:
            conversation = conversation_of(row, folder)
            chosen = self._labelled(row, conversation)
            rejected = None
            if row.rejected is not None:
                other = replace(conversation[-1], parts=(TextPart(row.rejected),), reasoning=None)
                if "</think>" in row.rejected:
                    raise TrainingError("a rejected answer with thinking is not read")
                rejected = self._labelled(row, [*conversation[:-1], other])
        except Error as error:
            raise TrainingError(f"{row.source}: {error.message}", row=row.source) from error
        thinks = row.turns[-1].reasoning is not None
        return Sample(chosen.prompt, chosen.labels, row.source, rejected, thinks)

    def _labelled(self, row: Row, conversation: Sequence[Message]) -> Rendering:
        wanted = [index for index, turn in enumerate(row.turns) if turn.is_supervised]
        return render_with_labels(
            conversation,
            self.tokenizer,
            tools=row.tools,
            dialect=self.dialect,
            supervise=wanted,
            load=self.load,
        )


def conversation_of(row: Row, folder: Path) -> list[Message]:
    """The row as messages, media read from disk or fetched."""
    return [
        Message(
            turn.role,
            tuple(_part(piece, folder) for piece in turn.pieces if piece.value or piece.kind != "text"),
            turn.reasoning,
            turn.tool_calls,
        )
        for turn in row.turns
    ]


def _part(piece: Piece, folder: Path) -> Part:
    if piece.kind == "text":
        return TextPart(piece.value)
    if piece.value.startswith(("http://", "https://", "data:")):
        data = asyncio.run(fetch(piece.value, piece.kind, FetchRules()))
    else:
        try:
            data = check_kind((folder / piece.value).read_bytes(), piece.kind)
        except OSError as error:
            raise TrainingError(f"{piece.value} cannot be read: {error.strerror}") from error
    return ImagePart(data) if piece.kind == "image" else VideoPart(data)


class Samples:
    """All rows of some files, rendered. Rows that are longer than `max_tokens` are errors or left out."""

    def __init__(
        self, files: Sequence[Path], renderer: Renderer, max_tokens: int, leave_out_long: bool = False
    ) -> None:
        self._renderer = renderer
        self._rows: list[tuple[Row, Path]] = []
        self._kept: dict[int, Sample] = {}
        self.left_out: list[Problem] = []
        self.tokens: list[int] = []
        self.patches: list[int] = []
        self.supervised: list[int] = []
        problems: list[Problem] = []
        kept_bytes = 0
        for file in files:
            rows, bad = check_rows(file)
            problems += bad
            for row in rows:
                try:
                    sample = renderer.render(row, file.parent)
                except TrainingError as error:
                    problems.append(Problem(row.source, error.message.removeprefix(f"{row.source}: ")))
                    continue
                if sample.num_tokens > max_tokens:
                    said = f"{sample.num_tokens} tokens; at most {max_tokens} are possible (max_tokens)"
                    (self.left_out if leave_out_long else problems).append(Problem(row.source, said))
                    continue
                kept_bytes += sum(media.patches.nbytes for media in sample.prompt.media)
                if kept_bytes <= KEEP_BYTES:
                    self._kept[len(self._rows)] = sample
                self._rows.append((row, file.parent))
                self.tokens.append(sample.num_tokens)
                self.patches.append(sample.num_patches)
                self.supervised.append(sample.num_supervised)
        _raise(problems)
        if not self._rows:
            raise TrainingError(f"no row to learn from in {', '.join(map(str, files))}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        if index in self._kept:
            return self._kept[index]
        return self._renderer.render(*self._rows[index])

    def row(self, index: int) -> Row:
        return self._rows[index][0]


def _raise(problems: Sequence[Problem], shown: int = 20) -> None:
    if problems:
        listed = "; ".join(f"{problem.source}: {problem.message}" for problem in problems[:shown])
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise TrainingError(f"{len(problems)} rows are bad: {listed}{more}", problems=list(problems))


def patches_of(samples: Sequence[Sample]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None:
    """uint8 [P, 588] of all media, in prompt order; None where there is no picture."""
    found = [media.patches for sample in samples for media in sample.prompt.media]
    return np.concatenate(found) if found else None
