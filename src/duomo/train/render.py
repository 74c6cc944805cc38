"""Examples to ids and labels, in the words of the chat template (spec 5.2).

Several questions share one picture: the picture's tokens are a prefix, each question with its answer is a
block that sees the prefix and itself. That is exactly as if each question had been asked alone (the test
compares the logits), at a fraction of the cost of encoding the picture again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from duomo.processing.messages import Tool
from duomo.processing.patches import patchify
from duomo.processing.prompt import Grid
from duomo.processing.template import tool_list
from duomo.processing.tokenizer import Tokenizer
from duomo.processing.video import stamp_frames
from duomo.tasks.scene import Example, Function, Turn

IGNORE = -100
PLACE = re.compile(r"(<\|LOC_\w+\|>)")
Array: TypeAlias = npt.NDArray[Any]


@dataclass(slots=True)
class Sample:
    """One picture with its blocks. `block[i]` is 0 in the prefix and counts up over the blocks."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # of the next token, IGNORE where nothing is asked
    block: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of each block, from 1
    media_start: int = -1
    grid: Grid | None = None
    patches: Array | None = None  # uint8 [P, 588]


class Renderer:
    """Holds the ids of the control tokens; `render` makes Samples."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.special_id
        self.begin, self.end = special("<|begin_of_sentence|>"), special("<|end_of_sentence|>")
        self.think, self.unthink = special("<think>"), special("</think>")
        self.patch = special("<|IMAGE_PLACEHOLDER|>")
        self.image = special("<|IMAGE_START|>"), special("<|IMAGE_END|>")
        self.video = special("<|VIDEO_START|>"), special("<|VIDEO_END|>")
        self.tools = special("<tool_list>"), special("</tool_list>")
        self.call = special("<tool_call>"), special("</tool_call>")
        self.eos = special("</s>")

    def render(self, example: Example, rng: np.random.Generator, alone: float = 0.2) -> Sample:
        """Mostly blocks behind one picture; sometimes a conversation, or the question before the picture.

        `alone` is the share of each of the two, which supervise one answer alone.
        """
        sample = Sample()
        if example.picture is not None:
            patches, grid = patchify(stamp_frames(example.picture, example.times))
            sample.patches, sample.grid = patches, grid
        style = rng.random()
        if example.picture is not None and style < alone:
            self._question_first(sample, example.turns[0])
        elif style < 2 * alone:
            self._conversation(sample, example.turns)
        else:
            self._prefix(sample, [self.begin, "User: "])
            for turn in example.turns:
                self._open(sample, turn.kind)
                self._offer(sample, turn.functions)
                self._turn(
                    sample, turn, turn.question if sample.grid is not None else "User: " + turn.question
                )
        return sample

    def _prefix(self, sample: Sample, head: list[str | int]) -> None:
        if sample.grid is None:
            self._add(sample, head[:1])
            return
        count, is_video = sample.grid.num_tokens, sample.grid.frames > 1
        start, end = self.video if is_video else self.image
        self._add(sample, [*head, "Video 1:" if is_video else "Picture 1:", start])
        sample.media_start = len(sample.ids)
        self._add(sample, [*[self.patch] * count, end])

    def _question_first(self, sample: Sample, turn: Turn) -> None:
        self._prefix(sample, [self.begin, "User: " + turn.question])
        self._open(sample, turn.kind)
        self._turn(sample, turn, "")

    def _conversation(self, sample: Sample, turns: tuple[Turn, ...]) -> None:
        """The last turn after the others, which stand there as history does in use: answers alone."""
        self._prefix(sample, [self.begin, "User: "])
        self._open(sample, turns[-1].kind)
        self._offer(sample, turns[-1].functions)
        opening = "" if sample.grid is not None else "User: "
        for turn in turns[:-1]:
            self._add(sample, [f"{opening}{turn.question}\nAssistant: ", *self._said(turn), self.end])
            opening = "User: "
        self._turn(sample, turns[-1], opening + turns[-1].question)

    def _open(self, sample: Sample, kind: str) -> None:
        sample.kinds.append(kind)

    def _turn(self, sample: Sample, turn: Turn, question: str) -> None:
        asked: list[str | int] = [question + "\nAssistant: ", self.think]
        said = self._said(turn)
        answer: list[str | int]
        if turn.reasoning is None:
            asked += ["\n\n", self.unthink, "\n\n"]
            answer = [*said, self.end]
        else:
            answer = [f"\n{turn.reasoning}\n", self.unthink, "\n", *said, self.end]
        # "\n\n" and the answer must stay two texts here: in use the answer begins a text of its own.
        self._add(sample, asked)
        self._add(sample, answer, is_answer=True)

    def _said(self, turn: Turn) -> list[str | int]:
        """The answer, with places and calls as control tokens."""
        if turn.functions:
            return [self.call[0], f"\n{turn.answer}\n", self.call[1], "\n"]
        pieces = PLACE.split(turn.answer)
        return [self.tokenizer.special_id(p) if PLACE.fullmatch(p) else p for p in pieces if p]

    def _offer(self, sample: Sample, functions: tuple[Function, ...]) -> None:
        """The tools stand right after the beginning, in the words of the chat template."""
        if functions:
            listed = tool_list([Tool(f.name, "", f.schema) for f in functions])
            self._add(sample, ["\n", self.tools[0], listed, self.tools[1], "\n"])

    def _add(self, sample: Sample, segments: list[str | int], is_answer: bool = False) -> None:
        ids = encode_segments(self.tokenizer, segments)
        targets = [self.eos if token == self.end else token for token in ids]
        if is_answer:  # the token before the answer predicts its first
            sample.labels[-1:] = targets[:1]
            sample.labels += [*targets[1:], IGNORE]
        else:
            sample.labels += [IGNORE] * len(ids)
        sample.ids += ids
        sample.block += [len(sample.kinds)] * len(ids)


def encode_segments(tokenizer: Tokenizer, segments: list[str | int]) -> list[int]:
    """Ids of a rendered template: ints are control tokens, neighbouring strings are one text."""
    ids: list[int] = []
    text = ""
    for segment in [*segments, None]:
        if isinstance(segment, str):
            text += segment
            continue
        ids += tokenizer.encode(text)
        text = ""
        if segment is not None:
            ids.append(segment)
    return ids
