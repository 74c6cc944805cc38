"""The frozen held-out questions: drawn from seeds, from the test split alone, and known by their hash.

Handwriting comes from samples that no training picture shows, scenes and sums from the test side of the
split. Each kind of question has its own count; the hash covers scenes, questions and answers in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO

import numpy as np
from PIL import Image

from duomo.processing.images import load_image
from duomo.processing.messages import ImagePart, Message, Tool, VideoPart
from duomo.processing.prompt import Media, Prompt
from duomo.processing.template import build_prompt
from duomo.processing.tokenizer import Tokenizer
from duomo.processing.video import load_frames
from duomo.tasks import Example, Handwriting, Turn, dialogue, digits, shapes
from duomo.tasks.scene import Function, Pixels

SEED = 451
NUM_READ = 900
NUM_OTHER = 200
SPACING, CLOSE = 0.85, 0.72  # least distance of neighbouring digits, of their size; at 0.72 some touch


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One turn behind one picture, or behind none."""

    kind: str
    question: str
    answer: str
    thinking: bool
    scene: str
    picture: Pixels | None = None  # or frames, where `times` says when
    times: tuple[float, ...] = ()
    functions: tuple[Function, ...] = ()

    def with_thinking(self) -> Question:
        return replace(self, thinking=True)

    def blinded(self) -> Question:
        """The same question about a grey picture of the same size."""
        if self.picture is None:
            return self
        return replace(self, picture=np.full_like(self.picture, 128))


def frozen_questions(
    pool: Handwriting, num_read: int = NUM_READ, num_other: int = NUM_OTHER
) -> list[Question]:
    """The questions, the same at every call. `pool` is the test split's handwriting."""
    counts: Counter[str] = Counter()
    found = []
    for example in _examples(pool, num_read, num_other):
        for turn in example.turns:
            limit = num_read if turn.kind == "digits/read" else num_other
            if counts[turn.kind] < limit:
                counts[turn.kind] += 1
                found.append(question_of(example, turn))
    return found


def _examples(pool: Handwriting, num_read: int, num_other: int) -> Iterator[Example]:
    rng = np.random.default_rng([SEED, 0])
    for _ in range(num_read):
        example = digits.generate(rng, pool, min_spacing=SPACING)
        reads = [turn for turn in example.turns if turn.kind == "digits/read"][:1]
        others = [turn for turn in example.turns if turn.kind != "digits/read"]
        yield Example((*reads, *others), example.scene, example.picture)
    rng = np.random.default_rng([SEED, 3])
    for _ in range(num_other):
        example = digits.generate(rng, pool, min_spacing=CLOSE)
        yield Example(
            (replace(example.turns[0], kind="digits/read touching"),), example.scene, example.picture
        )
    rng = np.random.default_rng([SEED, 1])
    for _ in range(4 * num_other):
        yield shapes.generate(rng, "test", num_turns=2)
    rng = np.random.default_rng([SEED, 2])
    for _ in range(8 * num_other):
        yield dialogue.generate(rng, "test")


def question_of(example: Example, turn: Turn) -> Question:
    """The question as it is asked: what was drawn, and nothing of the thought."""
    return Question(
        turn.kind,
        turn.question,
        turn.answer,
        turn.reasoning is not None,
        example.scene,
        example.picture,
        example.times,
        turn.functions,
    )


def hash_of(questions: list[Question]) -> str:
    """blake2b of scenes, questions and answers: says that two people asked the same things."""
    digest = blake2b(digest_size=16)
    for question in questions:
        line = (question.kind, question.scene, question.question, question.answer, str(question.thinking))
        digest.update("\x1f".join(line).encode() + b"\n")
    return digest.hexdigest()


def prompt_of(question: Question, tokenizer: Tokenizer) -> Prompt:
    """The prompt of a single user turn, as the server makes it: picture as PNG, then the question.

    A video's frames are taken as they are, with their times on them: its codec is not what is judged.
    """

    def load(part: ImagePart | VideoPart) -> Media:
        if isinstance(part, ImagePart):
            return load_image(part)
        assert question.picture is not None
        return load_frames(question.picture, question.times)

    tools = [Tool(function.name, "", function.schema) for function in question.functions]
    message = message_of(question)
    return build_prompt([message], tokenizer, thinking=question.thinking, tools=tools, load=load)


def message_of(question: Question) -> Message:
    """Picture first, then the words."""
    if question.picture is None:
        return Message.of("user", question.question)
    if question.times:
        return Message.of("user", VideoPart(b""), question.question)
    return Message.of("user", ImagePart(picture_png(question.picture)), question.question)


def picture_png(picture: Pixels) -> bytes:
    stream = BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()
