"""Several questions behind one picture equal each of them asked alone; labels stand where they should."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from duomo.processing.messages import ImagePart, Message
from duomo.processing.patches import normalize
from duomo.processing.prompt import MediaSpan
from duomo.processing.template import render_with_labels
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import Example, Handwriting, Turn, dialogue, digits
from duomo.train.batches import BlockCache, collate, model_batch, patches_tensor
from duomo.train.render import IGNORE, Renderer, Sample
from duomo.train.run import build_model


class Always:
    """A generator that always picks the style of blocks behind one picture."""

    def random(self) -> float:
        return 0.9


def blocks_of(renderer: Renderer, example: Example) -> Sample:
    return renderer.render(example, Always())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def example(pool: Handwriting) -> Example:
    return digits.generate(np.random.default_rng(4), pool, (84, 112))


def test_block_masked_logits_equal_questions_asked_alone(tokenizer: Tokenizer, example: Example) -> None:
    model, renderer = build_model(tokenizer, 3).eval(), Renderer(tokenizer)
    together = collate([blocks_of(renderer, example)], pad_id=0)
    patches = patches_tensor(together)
    assert patches is not None
    with torch.inference_mode():
        features = model.encode(patches, together.grids)
        batch = model_batch(together, model.config, features)
        found = model.unembed(model(batch, BlockCache(together.block_BL)))
    done = 0
    for turn in example.turns:
        alone = blocks_of(renderer, Example((turn,), example.scene, example.picture))
        assert alone.grid is not None and alone.patches is not None
        span = MediaSpan(alone.media_start, alone.grid)
        logits = model.logits(alone.ids, [span], torch.from_numpy(normalize(alone.patches)))
        wanted = logits[torch.from_numpy(np.flatnonzero(np.array(alone.labels) != IGNORE))]
        assert torch.allclose(found[done : done + len(wanted)], wanted, atol=2e-4)
        done += len(wanted)
    assert done == len(found)


def test_a_padded_row_changes_nothing(tokenizer: Tokenizer, example: Example, pool: Handwriting) -> None:
    model, renderer = build_model(tokenizer, 3).eval(), Renderer(tokenizer)
    other = digits.generate(np.random.default_rng(8), pool, (84, 112), num_turns=6)
    samples = [blocks_of(renderer, example), blocks_of(renderer, other)]
    results = []
    for chosen in (samples[:1], samples):
        packed = collate(chosen, pad_id=0)
        patches = patches_tensor(packed)
        assert patches is not None
        with torch.inference_mode():
            batch = model_batch(packed, model.config, model.encode(patches, packed.grids))
            results.append(model.unembed(model(batch, BlockCache(packed.block_BL))))
    assert torch.allclose(results[0], results[1][: len(results[0])], atol=2e-4)


def test_labels_are_the_next_tokens_of_answers_alone(tokenizer: Tokenizer, example: Example) -> None:
    sample = blocks_of(Renderer(tokenizer), example)
    assert len(sample.ids) == len(sample.labels) == len(sample.block)
    eos = tokenizer.special_id("</s>")
    for block, turn in enumerate(example.turns, start=1):
        labels = [x for x, b in zip(sample.labels, sample.block, strict=True) if b == block and x != IGNORE]
        assert labels[-1] == eos
        text = tokenizer.decode(labels[:-1], skip_special=False)
        reasoning = f"\n{turn.reasoning}\n</think>\n" if turn.reasoning is not None else ""
        assert text == reasoning + turn.answer


def test_a_conversation_asks_only_its_last_turn(tokenizer: Tokenizer, example: Example) -> None:
    class Conversation:
        def random(self) -> float:
            return 0.3

    sample = Renderer(tokenizer).render(example, Conversation())  # type: ignore[arg-type]
    labels = [label for label in sample.labels if label != IGNORE]
    assert tokenizer.decode(labels[:-1]).endswith(example.turns[-1].answer)
    assert sample.ids.count(tokenizer.special_id("<|end_of_sentence|>")) == len(example.turns)


def as_png(example: Example) -> ImagePart:
    stream = BytesIO()
    Image.fromarray(example.picture).save(stream, format="PNG")
    return ImagePart(stream.getvalue())


def answer_of(turn: Turn) -> Message:
    return (
        Message.of("assistant", turn.answer)
        if turn.reasoning is None
        else Message("assistant", Message.of("assistant", turn.answer).parts, turn.reasoning)
    )


def test_training_sees_the_ids_and_labels_of_serving(
    tokenizer: Tokenizer, example: Example, pool: Handwriting
) -> None:
    """One question behind a picture, with and without thinking, is what the chat template renders."""
    turns = [*example.turns, *digits.generate(np.random.default_rng(11), pool, num_turns=8).turns]
    assert {turn.reasoning is None for turn in turns} == {True, False}
    for turn in turns:
        sample = blocks_of(Renderer(tokenizer), Example((turn,), example.scene, example.picture))
        asked = Message.of("user", as_png(example), turn.question)
        served = render_with_labels([asked, answer_of(turn)], tokenizer)
        assert sample.ids == served.prompt.ids
        assert sample.labels == served.labels
        assert sample.patches is not None
        assert np.array_equal(sample.patches, served.prompt.media[0].patches)
        assert sample.media_start == served.prompt.spans[0].start


def test_text_alone_and_history_are_rendered_as_in_serving(tokenizer: Tokenizer, example: Example) -> None:
    class Conversation:
        def random(self) -> float:
            return 0.3

    for seed in range(20):
        talk = dialogue.generate(np.random.default_rng(seed), "train")
        sample = blocks_of(Renderer(tokenizer), talk)
        served = render_with_labels(
            [Message.of("user", talk.turns[0].question), answer_of(talk.turns[0])], tokenizer
        )
        assert (sample.ids, sample.labels) == (served.prompt.ids, served.labels)
    sample = Renderer(tokenizer).render(example, Conversation())  # type: ignore[arg-type]
    history = []
    for index, turn in enumerate(example.turns):
        media = [as_png(example)] if index == 0 else []
        history.append(Message.of("user", *media, turn.question))
        last = index == len(example.turns) - 1
        history.append(answer_of(turn) if last else Message.of("assistant", turn.answer))
    served = render_with_labels(history, tokenizer)
    assert (sample.ids, sample.labels) == (served.prompt.ids, served.labels)
