import msgspec
import pytest

from duomo.serve.decode import decode
from duomo.serve.problems import Problem
from duomo.serve.schema import ChatRequest
from duomo.serve.thinking import EFFORT_TOKENS, resolve


def ask(default="auto", max_tokens=None, **fields):
    body = msgspec.json.encode({"messages": [], **fields})
    request, _ = decode(body, ChatRequest)
    return resolve(request, default, None, max_tokens)


ON = [
    {"thinking": True},
    {"thinking": "on"},
    {"thinking": {"type": "enabled"}},
    {"enable_thinking": True},
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"chat_template_kwargs": {"thinking": True}},
    {"chat_template_kwargs": {"options": {"thinking_mode": "open"}}},
    {"reasoning": {"enabled": True}},
    {"reasoning_effort": "low"},
    {"reasoning": {"effort": "high"}},
    {"metadata": {"enable_thinking": True}},
    {"metadata": {"enable_thinking": "true"}},
]
OFF = [
    {"thinking": False},
    {"thinking": 0},
    {"thinking": "off"},
    {"thinking": {"type": "disabled"}},
    {"enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"options": {"thinking_mode": "close"}}},
    {"reasoning": {"enabled": False}},
    {"reasoning_effort": "none"},
    {"thinking_budget": 0},
    {"metadata": {"enable_thinking": False}},
]


@pytest.mark.parametrize("fields", ON)
def test_every_spelling_of_on(fields):
    for default in ("off", "auto"):
        got = ask(default, **fields)
        assert got.mode == "on" and got.decided_by.split(".")[0] == next(iter(fields))


@pytest.mark.parametrize("fields", OFF)
def test_every_spelling_of_off(fields):
    got = ask("on", **fields)
    assert (got.mode, got.budget) == ("off", None) and got.decided_by.split(".")[0] == next(iter(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": 7},
        {"thinking": {"type": "enabled", "budget_tokens": 7}},
        {"thinking_budget": 7},
        {"thinking_token_budget": 7},
        {"thinking_budget_tokens": 7},
        {"reasoning_max_tokens": 7},
        {"reasoning": {"max_tokens": 7}},
        {"reasoning_effort": "high", "thinking_budget": 7},
    ],
)
def test_every_spelling_of_the_budget(fields):
    got = ask("off", **fields)
    assert (got.mode, got.budget) == ("on", 7)


def test_the_precedence():
    assert ask("on").decided_by == "server"
    assert ask("off", reasoning_effort="high").mode == "on"
    assert ask("on", enable_thinking=False, reasoning_effort="high").mode == "off"
    assert ask("off", thinking="auto", thinking_budget=9) == ask(
        "off", thinking="auto", reasoning_max_tokens=9
    )
    assert ask("off", enable_thinking=True, thinking=True).decided_by == "thinking"
    assert ask("on", enable_thinking=False, thinking_budget=5).budget is None
    for effort, tokens in EFFORT_TOKENS.items():
        assert ask("off", reasoning_effort=effort).budget == tokens


def test_a_budget_leaves_room_for_the_answer_where_max_tokens_is_known():
    assert ask("on", max_tokens=100).budget == 80
    assert ask("on", max_tokens=1).budget == 1
    assert ask("on", max_tokens=100, thinking_budget=100).budget == 100
    assert ask("off", max_tokens=100).budget is None


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": True, "thinking": "off"},
        {"chat_template_kwargs": {"enable_thinking": True, "options": {"thinking_mode": "close"}}},
        {"thinking_budget": 3, "reasoning_max_tokens": 4},
        {"enable_thinking": True, "thinking_budget": 0},
        {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
        {"thinking": "auto", "enable_thinking": True},
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields):
    with pytest.raises(Problem) as wrong:
        ask("on", **fields)
    assert wrong.value.status == 400 and wrong.value.code == "contradictory_thinking" and wrong.value.param


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinkng": True, "thinkingg": 1},
        {"chat_template_kwargs": {"enable_thinkin": False, "no_think": True}},
        {"chat_template_kwargs": {"options": {"thinking": "close"}}},
        {"reasoning_tokens": 3},
    ],
)
def test_an_unknown_thinking_field_is_refused_loudly(fields):
    with pytest.raises(Problem) as wrong:
        ask(**fields)
    assert wrong.value.code == "unknown_thinking_field"


@pytest.mark.parametrize(
    "fields",
    [{"reasoning_max_tokens": -1}, {"thinking": -1}, {"thinking": "maybe"}, {"reasoning_effort": "max"}],
)
def test_a_bad_value_is_refused(fields):
    with pytest.raises(Problem) as wrong:
        ask(**fields)
    assert wrong.value.status == 400 and wrong.value.param == next(iter(fields))
