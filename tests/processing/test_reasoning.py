"""Reasoning, content and calls: each dialect's rules, and the same result for every way of cutting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.errors import ConfigError
from duomo.processing.messages import ToolCall
from duomo.processing.reasoning import (
    PARSERS,
    AnswerParser,
    ParsedAnswer,
    ParserName,
    join_pieces,
    parse_answer,
    parser_named,
)

ARGUMENTS = '{"box": [1, 2], "note": "a } \\" </tool_call>"}'
CALL = f'<tool_call>\n{{"name": "zoom", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
ZOOM = ToolCall("call_0", "zoom", {"box": [1, 2], "note": 'a } " </tool_call>'})


@pytest.mark.parametrize("name", PARSERS)
def test_splits_at_the_first_closing_tag_and_drops_the_newlines_around(name: ParserName) -> None:
    found = parse_answer("\nA bird,\nI think.\n</think>\n\nA magpie</think>.", name, is_thinking=True)
    assert found == ParsedAnswer("A bird,\nI think.", "A magpie</think>.")


@pytest.mark.parametrize("name", PARSERS)
def test_a_thought_cut_off_is_reasoning(name: ParserName) -> None:
    assert parse_answer("It may be a bi", name, is_thinking=True) == ParsedAnswer("It may be a bi")
    assert parse_answer("It may be </thi", name, is_thinking=True) == ParsedAnswer("It may be </thi")


@pytest.mark.parametrize("name", PARSERS)
def test_without_thinking_all_is_content(name: ParserName) -> None:
    found = parse_answer("Seven, says </think>.\n", name, is_thinking=False)
    assert found == ParsedAnswer("", "Seven, says </think>.\n")


def test_an_opening_tag_of_the_model_is_swallowed_at_the_start_only() -> None:
    assert parse_answer("<think>\na <think> b</think>c", "ernie-x1", is_thinking=True) == ParsedAnswer(
        "a <think> b", "c"
    )


@pytest.mark.parametrize("name", PARSERS)
def test_a_call_after_newlines_alone(name: ParserName) -> None:
    found = parse_answer(f"Zoom in.\n</think>\n\n{CALL}", name, is_thinking=True, has_tools=True)
    assert found == ParsedAnswer("Zoom in.", "", (ZOOM,))


def test_parallel_calls() -> None:
    two = CALL + '<tool_call>\n{"name": "search", "arguments": {"for": "喜鹊"}}\n</tool_call>\n'
    found = parse_answer("</think>\n" + two, "ernie-45-vl-thinking", is_thinking=True, has_tools=True)
    assert found.tool_calls == (ZOOM, ToolCall("call_1", "search", {"for": "喜鹊"}))
    assert found.content == ""


def test_text_before_a_call_makes_it_content_only_where_calls_come_first() -> None:
    text = f"Let me look.\n{CALL}"
    strict = parse_answer(text, "ernie-45-vl-thinking", is_thinking=False, has_tools=True)
    assert strict == ParsedAnswer("", text)
    lenient = parse_answer(text, "ernie-45-vl", is_thinking=False, has_tools=True)
    assert lenient == ParsedAnswer("", "Let me look.", (ZOOM,))


def test_without_tools_a_call_is_text() -> None:
    assert parse_answer(CALL, "ernie-45-vl", is_thinking=False).content == CALL


@pytest.mark.parametrize("closing", ["\n</response>\n", "</response>", "\n", ""])
def test_response_tags_are_swallowed_and_the_last_may_be_missing(closing: str) -> None:
    found = parse_answer(f"hm\n</think>\n<response>\nSeven.{closing}", "ernie-x1", is_thinking=True)
    assert (found.reasoning, found.content.rstrip("\n")) == ("hm", "Seven.")


def test_a_call_after_a_response() -> None:
    text = f"</think>\n<response>\nLook:\n</response>\n{CALL}"
    found = parse_answer(text, "ernie-x1", is_thinking=True, has_tools=True)
    assert found == ParsedAnswer("", "Look:", (ZOOM,))


BROKEN = [
    '<tool_call>\n{"name": "zoom", "arguments": {"box": [1, }}\n</tool_call>',
    '<tool_call>\n{"name": "zoom", "arguments": {"box": 1}} and more</tool_call>',
    '<tool_call>\n{"name": "zoom", "arguments": {"box": 1}\n</tool_call>',
    '<tool_call>\n{"name": "zoom", "arguments": {"box": 1',
    '<tool_call>\n{"name": "zoom", "arguments": {"box": NaN}}\n</tool_call>',
    '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
    "<tool_call>\nzoom\n</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call>",
]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_call_stays_text_in_full(text: str) -> None:
    found = parse_answer(text, "ernie-45-vl", is_thinking=False, has_tools=True)
    assert found == ParsedAnswer("", text)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"arguments": {"box": 1}, "name": "zoom"}</tool_call>',
        '<tool_call>{"name": "zoom", "arguments": "{\\"box\\": 1}"}</tool_call>',
        '<tool_call>"name": "zoom", "arguments": {"box": 1}</tool_call>',
        '<tool_call>{"name": "zoom", "parameters": {"box": 1}}',
        '<tool_call>{"name": "zoom", "arguments": {"box": 1}}',
    ],
)
def test_other_spellings_of_a_call(text: str) -> None:
    found = parse_answer(text, "ernie-45-vl", is_thinking=False, has_tools=True)
    assert found == ParsedAnswer("", "", (ToolCall("call_0", "zoom", {"box": 1}),))


def test_arguments_stream_while_they_grow() -> None:
    parser = AnswerParser("ernie-45-vl", is_thinking=False, has_tools=True)
    parser.feed('<tool_call>\n{"name": "zoom", "argum')
    first = parser.feed('ents": {"bo').calls
    assert [(c.id, c.name, c.arguments) for c in first] == [("call_0", "zoom", ""), (None, None, '{"bo')]
    assert [c.arguments for c in parser.feed('x": 1').calls] == ['x": 1']


def test_parsers_go_by_fastdeploys_names() -> None:
    assert parser_named("ernie_45_vl_thinking") == "ernie-45-vl-thinking"
    with pytest.raises(ConfigError, match="ernie-45-vl, ernie-45-vl-thinking, ernie-x1"):
        parser_named("qwen3")


TAGS = ["</think>", "<think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
HALVES = ["<", "</t", "{", "}", '"', "\\", '{"name": "x", "arguments": {', '"name"', "}}"]
SCRAPS = st.sampled_from([*TAGS, *HALVES, CALL, *BROKEN, "\n", "\n\n", " ", "喜鹊", "a"])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(SCRAPS, max_size=8).map("".join),
    st.sampled_from(PARSERS),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_every_way_of_cutting_gives_the_same(
    text: str, name: ParserName, is_thinking: bool, has_tools: bool, data: st.DataObject
) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    cuts = [[text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)], list(text)]
    whole = parse_answer(text, name, is_thinking=is_thinking, has_tools=has_tools)
    for pieces in cuts:
        parser = AnswerParser(name, is_thinking=is_thinking, has_tools=has_tools)
        assert join_pieces([*map(parser.feed, pieces), parser.finish()]) == whole


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab<>/think\n{}", max_size=60))
def test_nothing_but_tags_and_newlines_is_lost(text: str) -> None:
    found = parse_answer(text, "ernie-45-vl", is_thinking=True, has_tools=True)
    shown = found.reasoning + found.content
    plain = text.replace("</think>", "", 1)
    if not plain.lstrip("\n").startswith("<think>"):
        assert shown.replace("\n", "") == plain.replace("\n", "")
