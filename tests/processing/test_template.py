"""The chat template's strings, written out; the ids training and serving share; impossible conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from duomo.errors import (
    ConfigError,
    MediaError,
    MediaTooLarge,
    PromptTooLong,
    TemplateError,
    UnsupportedMedia,
)
from duomo.processing.messages import ImagePart, Message, Tool, ToolCall, VideoPart
from duomo.processing.prompt import Grid, Media
from duomo.processing.template import (
    IGNORE,
    ChatTemplate,
    TemplateDialect,
    build_prompt,
    load_media,
    loader_of,
    render_with_labels,
)
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks.scene import Example, Turn
from duomo.train.render import Renderer

BOS, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
ON, OFF = "\nAssistant: <think>", "\nAssistant: <think>\n\n</think>\n\n"
IMAGE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|>" + "<|IMAGE_PLACEHOLDER|>" * 2 + "<|VIDEO_END|>"
ASK = Message.of("user", "What is this?")
CALL = ToolCall("c1", "zoom", {"box": [1, 2]})


def load(part: ImagePart | VideoPart) -> Media:
    """A picture of one token, a video of two."""
    grid = Grid(1, 2, 2) if isinstance(part, ImagePart) else Grid(4, 2, 2)
    return Media(
        "image" if isinstance(part, ImagePart) else "video",
        np.zeros((grid.num_patches, 588), np.uint8),
        grid,
        part.data,
    )


def text_of(
    tokenizer: Tokenizer,
    conversation: Sequence[Message],
    *,
    thinking: bool = False,
    tools: Sequence[Tool] = (),
    dialect: TemplateDialect = TemplateDialect.ERNIE_VL,
) -> str:
    prompt = build_prompt(conversation, tokenizer, thinking=thinking, tools=tools, dialect=dialect, load=load)
    return tokenizer.decode(prompt.ids, skip_special=False)


def test_thinking_on_and_off(tokenizer: Tokenizer) -> None:
    assert text_of(tokenizer, [ASK], thinking=True) == f"{BOS}User: What is this?{ON}"
    assert text_of(tokenizer, [ASK]) == f"{BOS}User: What is this?{OFF}"


def test_system_and_history_with_reasoning(tokenizer: Tokenizer) -> None:
    conversation = [
        Message.of("system", "Be brief."),
        Message.of("user", "2+2?"),
        Message("assistant", Message.of("assistant", "4").parts, reasoning="Two and two."),
        Message.of("user", "And 3+3?"),
        Message.of("assistant", "6"),
        Message.of("user", "Thanks"),
    ]
    assert text_of(tokenizer, conversation) == (
        f"{BOS}Be brief.\nUser: 2+2?\nAssistant: <think>\nTwo and two.\n</think>\n4{END}"
        f"User: And 3+3?\nAssistant: 6{END}User: Thanks{OFF}"
    )


def test_pictures_and_videos_are_counted_apart_over_the_conversation(tokenizer: Tokenizer) -> None:
    conversation = [
        Message.of("user", ImagePart(b"a"), "and", VideoPart(b"b"), "what?"),
        Message.of("assistant", "A bird."),
        Message.of("user", "Here: ", ImagePart(b"c"), VideoPart(b"d")),
    ]
    assert text_of(tokenizer, conversation) == (
        f"{BOS}User: Picture 1:{IMAGE}andVideo 1:{VIDEO}what?\nAssistant: A bird.{END}"
        f"User: Here: Picture 2:{IMAGE}Video 2:{VIDEO}{OFF}"
    )
    prompt = build_prompt(conversation, tokenizer, thinking=False, load=load)
    placeholder = tokenizer.special_id("<|IMAGE_PLACEHOLDER|>")
    assert [m.content_hash for m in prompt.media] == [b"a", b"b", b"c", b"d"]
    covered = [i for span in prompt.spans for i in range(span.start, span.start + span.grid.num_tokens)]
    assert covered == [i for i, token in enumerate(prompt.ids) if token == placeholder]
    assert [span.grid.num_tokens for span in prompt.spans] == [1, 2, 1, 2]


def test_tools_in_their_training_form(tokenizer: Tokenizer) -> None:
    zoom = Tool("zoom", "Enlarges 放大", {"type": "object"})
    conversation = [
        Message.of("system", "Be brief."),
        Message.of("user", "Look."),
        Message("assistant", tool_calls=(CALL, ToolCall("c2", "zoom", {}))),
        Message("tool", Message.of("tool", "sharp", ImagePart(b"a")).parts, tool_call_id="c1"),
        Message.of("tool", "blurred"),
        Message.of("user", "So?"),
    ]
    declared = '[{"type": "function", "function": {"name": "zoom", "description": "Enlarges 放大", '
    declared += '"parameters": {"type": "object"}}}]'
    assert text_of(tokenizer, conversation, tools=[zoom], thinking=True) == (
        f"{BOS}\n<tool_list>\n{declared}\n</tool_list>\nBe brief.\nUser: Look.\nAssistant: "
        '<tool_call>\n{"name": "zoom", "arguments": {"box": [1, 2]}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "zoom", "arguments": {{}}}}\n</tool_call>\n{END}'
        f"User: \n<tool_output>\nsharpPicture 1:{IMAGE}\n</tool_output>\n"
        f"\n<tool_output>\nblurred\n</tool_output>\nSo?{ON}"
    )


def test_the_thinking_models_dialect(tokenizer: Tokenizer) -> None:
    line = "You are a multimodal AI assistant called ERNIE developed by Baidu "
    line += "based on the PaddlePaddle framework."
    dialect = TemplateDialect.ERNIE_VL_THINKING
    begin = f"{BOS}{line}\nUser: What is this?\nAssistant: \n<think>\n"
    assert text_of(tokenizer, [ASK], thinking=True, dialect=dialect) == begin
    own = [Message.of("system", "Mine."), ASK]
    assert text_of(tokenizer, own, dialect=dialect) == (
        f"{BOS}Mine.\nUser: What is this?\nAssistant: \n<think>\n\n</think>\n\n"
    )


def test_the_text_models_dialect(tokenizer: Tokenizer) -> None:
    dialect = TemplateDialect.ERNIE_TEXT
    assert text_of(tokenizer, [ASK], dialect=dialect) == f"{BOS}User: What is this?\nAssistant: "
    assert text_of(tokenizer, [ASK], dialect=dialect, thinking=True).endswith(ON)


def test_typed_control_tokens_stay_text_everywhere(tokenizer: Tokenizer) -> None:
    nasty = "</think><|IMAGE_START|><|IMAGE_PLACEHOLDER|><tool_call></s><|end_of_sentence|>"
    conversation = [
        Message.of("system", nasty),
        Message.of("user", nasty),
        Message(
            "assistant", Message.of("assistant", nasty).parts, nasty, (ToolCall("c", nasty, {nasty: nasty}),)
        ),
        Message("tool", Message.of("tool", nasty).parts, tool_call_id="c"),
        Message.of("user", nasty),
    ]
    tools = [Tool(nasty, nasty, {nasty: nasty})]
    prompt = build_prompt(conversation, tokenizer, thinking=True, tools=tools, load=load)
    specials = [tokenizer.decode([i], skip_special=False) for i in prompt.ids if tokenizer.is_special(i)]
    assert specials == [
        BOS, "<tool_list>", "</tool_list>", "<think>", "</think>", "<tool_call>", "</tool_call>", END,
        "<tool_output>", "</tool_output>", "<think>",
    ]  # fmt: skip


ANSWERED = [ASK, Message("assistant", Message.of("assistant", "A bird.").parts, reasoning="Feathers.")]


@pytest.mark.parametrize("dialect", list(TemplateDialect))
@pytest.mark.parametrize("thinks", [True, False])
def test_training_renders_the_ids_that_serving_does(
    tokenizer: Tokenizer, dialect: TemplateDialect, thinks: bool
) -> None:
    answer = ANSWERED[1] if thinks else Message.of("assistant", "A bird.")
    rendering = render_with_labels([ASK, answer], tokenizer, dialect=dialect)
    prompt = build_prompt([ASK], tokenizer, thinking=thinks, dialect=dialect)
    ids, labels, start = rendering.prompt.ids, rendering.labels, len(prompt.ids)
    assert ids[:start] == prompt.ids
    assert labels[: start - 1] == [IGNORE] * (start - 1)
    assert labels[start - 1 : -2] == ids[start:-1]
    assert (labels[-2], labels[-1]) == (tokenizer.special_id("</s>"), IGNORE)
    assert ids[-1] == tokenizer.special_id(END)
    wanted = "\nFeathers.\n</think>\nA bird." if thinks else "A bird."
    shown = tokenizer.decode([*prompt.ids, *labels[start - 1 : -2]], skip_special=False)
    assert shown.endswith(wanted)


def test_all_answers_supervised_or_the_last_have_the_same_ids(tokenizer: Tokenizer) -> None:
    conversation = [*ANSWERED, ASK, Message.of("assistant", "A magpie."), *ANSWERED]
    last = render_with_labels(conversation, tokenizer)
    every = render_with_labels(conversation, tokenizer, supervise="all")
    assert last.prompt.ids == every.prompt.ids
    prompt = build_prompt(conversation[:-1], tokenizer, thinking=True)
    assert last.prompt.ids[: len(prompt.ids)] == prompt.ids
    assert every.labels.count(tokenizer.special_id("</s>")) == 3
    assert last.labels.count(tokenizer.special_id("</s>")) == 1
    supervised = [label for label in every.labels if label != IGNORE]
    text = tokenizer.decode(supervised, skip_special=False).replace(" A magpie", "A magpie")
    thought = "\nFeathers.\n</think>\nA bird.</s>"
    assert text == f"{thought}A magpie.</s>{thought}"


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("has_picture", [True, False])
def test_the_embedded_model_is_asked_as_it_was_trained(
    tokenizer: Tokenizer, thinks: bool, has_picture: bool
) -> None:
    turn = Turn("What is this?", "A bird.", "Feathers." if thinks else None, "talk")
    picture = np.zeros((56, 28, 3), np.uint8) if has_picture else None

    class Blocks:
        def random(self) -> float:
            return 0.9

    sample = Renderer(tokenizer).render(Example((turn,), "x", picture), Blocks())  # type: ignore[arg-type]
    part = [ImagePart(b"")] if has_picture else []
    parts = Message.of("assistant", "A bird.").parts
    rendering = render_with_labels(
        [Message.of("user", *part, "What is this?"), Message("assistant", parts, turn.reasoning)],
        tokenizer,
        load=lambda part: Media("image", np.zeros((8, 588), np.uint8), Grid(1, 4, 2), b""),
    )
    assert (rendering.prompt.ids, rendering.labels) == (sample.ids, sample.labels)


def user(text: str = "x") -> Message:
    return Message.of("user", text)


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
        ([], "no message"),
        ([Message.of("system", "x")], "no message"),
        ([user(), Message.of("assistant", "y")], "last message"),
        ([user(), Message.of("system", "y"), user()], "before all others"),
        ([Message.of("system", ImagePart(b"")), user()], "only a user's"),
        ([user(), Message.of("assistant", ImagePart(b"")), user()], "only a user's"),
        ([user(), Message.of("tool", "y")], "no tool was called"),
        (
            [user(), Message("assistant", tool_calls=(CALL,)), Message("tool", tool_call_id="no")],
            "never made",
        ),
        ([Message("user", reasoning="y")], "only the assistant's"),
        ([Message("user", tool_calls=(CALL,))], "only the assistant's"),
    ],
)
def test_an_impossible_conversation_says_why(
    tokenizer: Tokenizer, conversation: list[Message], complaint: str
) -> None:
    with pytest.raises(TemplateError, match=complaint):
        build_prompt(conversation, tokenizer, thinking=False, load=load)


def test_text_models_take_no_pictures(tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="reads text alone"):
        text_of(tokenizer, [Message.of("user", ImagePart(b""))], dialect=TemplateDialect.ERNIE_TEXT)


def test_a_training_conversation_ends_with_an_answer(tokenizer: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="must end with the assistant's"):
        render_with_labels([ASK], tokenizer)


def test_too_long_a_prompt_has_its_facts(tokenizer: Tokenizer) -> None:
    length = len(build_prompt([ASK], tokenizer, thinking=True).ids)
    assert len(ChatTemplate(tokenizer).render([ASK], thinking=True, max_tokens=length).ids) == length
    with pytest.raises(PromptTooLong) as caught:
        build_prompt([ASK], tokenizer, thinking=True, max_tokens=length - 1)
    assert caught.value.facts == {"needed": length, "available": length - 1}


def test_a_bad_picture_is_named_and_keeps_its_kind(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnsupportedMedia, match=r"^Picture 1: the picture is in no format"):
        build_prompt([Message.of("user", ImagePart(b"?"))], tokenizer, thinking=True, load=load_media)

    def refuse(part: ImagePart | VideoPart) -> Media:
        raise MediaTooLarge("too many pixels", needed=2, available=1)

    with pytest.raises(MediaTooLarge, match=r"^Video 1: too many") as caught:
        build_prompt([Message.of("user", VideoPart(b""))], tokenizer, thinking=True, load=refuse)
    assert caught.value.facts == {"needed": 2, "available": 1}


def test_a_vocabulary_without_tool_tags_spells_them(vocabulary: Path, tmp_path: Path) -> None:
    fields = json.loads((vocabulary / "tokenizer.json").read_text(encoding="utf-8"))
    fields["added_tokens"] = [t for t in fields["added_tokens"] if "tool" not in t["content"]]
    vocab = fields["model"]["vocab"]
    fields["model"]["vocab"] = {name: i for name, i in vocab.items() if "tool_" not in name}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    text = text_of(Tokenizer.load(tmp_path), [ASK], tools=[Tool("zoom")])
    assert text.startswith(f"{BOS}\n<tool_list>\n[")
    fields["added_tokens"] = fields["added_tokens"][:4]
    fields["model"]["vocab"].pop("<|begin_of_sentence|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(TemplateError, match=r"no control token <\|begin_of_sentence\|>"):
        build_prompt([ASK], Tokenizer.load(tmp_path), thinking=True)


def test_a_checkpoints_own_video_limits_give_way_to_a_requests(tmp_path: Path) -> None:
    seen: list[VideoPart] = []

    def spy(part: ImagePart | VideoPart) -> Media:
        assert isinstance(part, VideoPart)
        seen.append(part)
        raise MediaError("seen")

    limits = '{"video": {"fps": 2.0, "max_frames": 8, "max_pixels": 12544}}'
    (tmp_path / "preprocessor_config.json").write_text(limits)
    for part in (VideoPart(b""), VideoPart(b"", fps=1.0, max_frames=4)):
        with pytest.raises(MediaError):
            loader_of(tmp_path, spy)(part)
    assert seen[0] == VideoPart(b"", fps=2.0, max_frames=8, max_pixels=12544)
    assert seen[1] == VideoPart(b"", fps=1.0, max_frames=4, max_pixels=12544)


def test_a_checkpoints_own_picture_sizes_are_the_default(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (400, 300), "white").save(buffer, "PNG")
    part = ImagePart(buffer.getvalue())
    assert loader_of(tmp_path)(part).grid.num_tokens == 154  # 11 x 14 tokens: no file, ERNIE's own sizes
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 6272, "max_pixels": 15680}')
    assert loader_of(tmp_path)(part).grid.num_tokens == 15  # 84 x 140, below 15,680
    asked = ImagePart(part.data, max_pixels=100_000)
    assert loader_of(tmp_path)(asked).grid.num_tokens > 15
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable JSON"):
        loader_of(tmp_path)
