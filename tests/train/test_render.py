"""Several questions behind one picture equal each of them asked alone; labels stand where they should."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from duomo.model import Ernie
from duomo.processing.messages import ImagePart, Message, Tool, ToolCall
from duomo.processing.patches import normalize
from duomo.processing.prompt import MediaSpan
from duomo.processing.template import render_with_labels
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks import Example, Handwriting, Turn, clips, dialogue, digits, places
from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import Pools
from duomo.train.batches import BlockCache, TrainingBatch, collate, model_batch, patches_tensor
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
        found = model.unembed(model(batch, BlockCache(together)))
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


def test_samples_of_one_row_change_nothing(tokenizer: Tokenizer, example: Example, pools: Pools) -> None:
    """Each of six samples, packed two or three to a row, has the logits that it has alone."""
    model, renderer = build_model(tokenizer, 3).eval(), Renderer(tokenizer)
    rng = np.random.default_rng(8)
    examples = [
        example,
        *(FAMILIES[name](rng, pools) for name in ("text", "clips", "text", "surface", "text")),
    ]
    samples = [blocks_of(renderer, one) for one in examples]
    packed = collate(samples, pad_id=0)
    assert packed.ids_BL.shape[0] < len(samples)
    together = logits_of(model, packed)
    flat = packed.sample_BL.reshape(-1)[packed.labels_BL.reshape(-1) != IGNORE]
    for index, sample in enumerate(samples):
        alone = logits_of(model, collate([sample], pad_id=0))
        assert torch.allclose(together[torch.from_numpy(flat == index)], alone, atol=2e-4)


def logits_of(model: Ernie, packed: TrainingBatch) -> Tensor:
    patches = patches_tensor(packed)
    with torch.inference_mode():
        features = None if patches is None else model.encode(patches, packed.grids)
        return model.unembed(model(model_batch(packed, model.config, features), BlockCache(packed)))


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


def test_videos_places_and_tool_calls_are_rendered_as_in_serving(tokenizer: Tokenizer, pools: Pools) -> None:
    """Frames carry their times; `<|LOC_x|>` and tools become the control tokens of the template."""
    renderer, rng = Renderer(tokenizer), np.random.default_rng(3)
    clip = clips.generate(rng, pools)
    assert clip.picture is not None
    found = renderer.render(Example(clip.turns[:1], clip.scene, clip.picture, times=clip.times), Always())  # type: ignore[arg-type]
    assert found.grid is not None and found.grid.frames == len(clip.times)
    assert found.ids.count(tokenizer.special_id("<|IMAGE_PLACEHOLDER|>")) == found.grid.num_tokens
    assert tokenizer.special_id("<|VIDEO_START|>") in found.ids
    boxed = next(t for t in places.generate(rng, pools).turns if t.kind == "places/box")
    labels = [x for x in blocks_of(renderer, Example((boxed,), "")).labels if x != IGNORE]
    assert tokenizer.decode(labels[:-1]) == boxed.answer and len(labels) == 7
    calls = [
        e.turns[0] for e in (FAMILIES["instructions"](rng, pools) for _ in range(40)) if e.turns[0].functions
    ]
    for turn in calls:
        sample = blocks_of(renderer, Example((turn,), ""))
        fields = json.loads(turn.answer)
        answer = Message("assistant", (), None, (ToolCall("1", fields["name"], fields["arguments"]),))
        tools = [Tool(f.name, "", f.schema) for f in turn.functions]
        served = render_with_labels([Message.of("user", turn.question), answer], tokenizer, tools=tools)
        assert (sample.ids, sample.labels) == (served.prompt.ids, served.labels)
    assert len(calls) > 4
