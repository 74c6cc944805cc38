"""The facade over a scripted model: text, thinking, tools, stops, control; streamed and whole alike."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duomo.engine.request import Completion, Constraint, Delta, SamplingParams
from duomo.engine.scripted import always
from duomo.errors import ConfigError, EngineError, GrammarError, PromptTooLong
from duomo.llm import LLM, Question
from duomo.processing.messages import Message, Tool
from duomo.processing.tokenizer import Tokenizer
from duomo.processing.tools import join_calls

ASK = [Message.of("user", "What is this?")]
WORDS = ["the cat sat on a mat and said: hello world, yes or no?", "猫坐在垫子上。你好！", '{"a": 1}']


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from duomo.train.vocabulary import train_vocabulary

    folder: Path = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary(WORDS * 30, folder / "tokenizer.json", vocab_size=700)
    return Tokenizer.load(folder)


def saying(tokenizer: Tokenizer, *parts: str, **options: object) -> LLM:
    """Says the parts after `<think>`, or after the closed block; control tokens by name."""
    ids: list[int] = []
    for part in parts:
        found = tokenizer.find_special(part)
        ids += tokenizer.encode(part) if found is None else [found]
    script = always(ids, tokenizer.eos_ids[0], tokenizer.special_id("<think>"))
    if options.pop("is_thinking", True) is False:
        opened = [*tokenizer.encode("\n\n"), tokenizer.special_id("</think>"), *tokenizer.encode("\n\n")]
        script = always([*opened, *ids], tokenizer.eos_ids[0], tokenizer.special_id("<think>"))
    return LLM.scripted(tokenizer, script, **options)


def joined(deltas: Iterator[Delta]) -> tuple[str, str, str | None, int]:
    parts = list(deltas)
    usage = parts[-1].usage
    assert usage is not None
    return (
        "".join(d.reasoning for d in parts),
        "".join(d.text for d in parts),
        parts[-1].finish_reason,
        usage.reasoning_tokens,
    )


def same(llm: LLM, params: SamplingParams) -> Completion:
    """The whole answer, after checking that the stream adds up to it."""
    whole = llm.chat(ASK, params)
    expected = (whole.reasoning, whole.text, whole.finish_reason, whole.usage.reasoning_tokens)
    assert joined(llm.stream(ASK, params)) == expected
    return whole


def thinking(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, thinking="on", **fields)  # type: ignore[arg-type]


def test_thinking_then_an_answer(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "\nthe cat sat\n", "</think>", "\nhello 猫") as llm:
        whole = same(llm, thinking())
    assert (whole.reasoning, whole.text, whole.finish_reason) == ("the cat sat", "hello 猫", "stop")
    assert whole.usage.reasoning_tokens + 1 < whole.usage.completion_tokens


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_is_kept_to_the_token(tokenizer: Tokenizer, budget: int) -> None:
    with saying(tokenizer, "the cat sat on a mat and said", "</think>", "\nhello") as llm:
        whole = same(llm, thinking(thinking_budget=budget, max_tokens=40))
    assert whole.usage.reasoning_tokens == budget
    assert whole.token_ids[budget] == tokenizer.special_id("</think>")
    assert (whole.reasoning == "") == (budget == 0)


def test_a_natural_end_before_the_budget(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "cat", "</think>", "hello") as llm:
        whole = same(llm, thinking(thinking_budget=50))
    assert (whole.reasoning, whole.text) == ("cat", "hello")


def test_max_tokens_inside_the_thinking_is_no_error(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat sat on a mat and said", "</think>", "hello") as llm:
        whole = same(llm, thinking(max_tokens=3))
    assert (whole.text, whole.finish_reason, whole.usage.reasoning_tokens) == ("", "length", 3)


def test_an_end_inside_the_thinking_closes_it(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat") as llm:
        whole = same(llm, thinking(max_tokens=30))
    assert whole.reasoning == "the cat" and tokenizer.special_id("</think>") in whole.token_ids


def test_a_loop_of_thoughts_is_broken(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat sat " * 200, "</think>", "hello") as llm:
        whole = same(llm, thinking(max_tokens=2000))
    assert whole.usage.reasoning_tokens < 100 and tokenizer.special_id("</think>") in whole.token_ids


def test_a_wrap_up_counts_within_the_budget(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat sat on a mat and said: hello world", "</think>", "hello") as llm:
        whole = same(llm, thinking(thinking_budget=12, wrap_up=" yes or no", max_tokens=60))
    assert whole.reasoning.endswith(" yes or no") and whole.usage.reasoning_tokens == 12


def test_thinking_off_has_none(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "hello", is_thinking=False) as llm:
        whole = same(llm, SamplingParams(temperature=0, thinking="off"))
    assert (whole.reasoning, whole.text, whole.usage.reasoning_tokens) == ("", "hello", 0)


@pytest.mark.parametrize("stop", ["t on a m", "sat", "d: h", "no?"])
def test_a_stop_string_across_tokens_is_not_shown(tokenizer: Tokenizer, stop: str) -> None:
    with saying(tokenizer, "sat", "</think>", WORDS[0]) as llm:
        whole = same(llm, thinking(stop=(stop,)))
    assert whole.text == WORDS[0].split(stop)[0] and whole.reasoning == "sat"
    assert whole.finish_reason == "stop"


def test_a_call_of_a_tool(tokenizer: Tokenizer) -> None:
    body = json.dumps({"name": "zoom", "arguments": {"a": "猫 }"}}, ensure_ascii=False)
    with saying(
        tokenizer, "cat", "</think>", "\n", "<tool_call>", f"\n{body}\n", "</tool_call>", "\n"
    ) as llm:
        whole = llm.chat(ASK, thinking(), tools=[Tool("zoom")])
    assert [(c.name, c.arguments) for c in whole.tool_calls] == [("zoom", {"a": "猫 }"})]
    assert (whole.finish_reason, whole.text) == ("tool_calls", "")


def test_the_arguments_of_a_call_are_streamed_as_they_grow(tokenizer: Tokenizer) -> None:
    body = '{"name": "zoom", "arguments": {"a": "the cat sat on a mat"}}'
    parts = ["cat", "</think>", "<tool_call>", f"\n{body}\n", "</tool_call>"]
    with saying(tokenizer, *parts) as llm:
        deltas = list(llm.stream(ASK, thinking(), [Tool("zoom")]))
        whole = llm.chat(ASK, thinking(), [Tool("zoom")])
    pieces = [call for delta in deltas for call in delta.tool_calls]
    assert len([piece for piece in pieces if piece.arguments]) > 3
    assert "".join(piece.arguments for piece in pieces) == '{"a": "the cat sat on a mat"}'
    assert [(c.name, c.arguments) for c in join_calls(pieces)] == [("zoom", {"a": "the cat sat on a mat"})]
    assert [c.arguments for c in whole.tool_calls] == [{"a": "the cat sat on a mat"}]
    assert deltas[-1].finish_reason == whole.finish_reason == "tool_calls"


def test_a_call_that_breaks_off_is_text_again(tokenizer: Tokenizer) -> None:
    text = '<tool_call>\n{"name": "zoom", "arguments": {"a": the cat}}'
    with saying(tokenizer, "cat", "</think>", text) as llm:
        deltas = list(llm.stream(ASK, thinking(), [Tool("zoom")]))
        whole = llm.chat(ASK, thinking(), [Tool("zoom")])
    assert "".join(delta.text for delta in deltas) == whole.text == text
    assert any(call.is_broken for delta in deltas for call in delta.tool_calls)
    assert (whole.tool_calls, whole.finish_reason, deltas[-1].finish_reason) == ((), "stop", "stop")


def test_the_response_tags_of_x1_are_swallowed_and_kept_by_the_others(tokenizer: Tokenizer) -> None:
    parts = ["cat", "</think>", "\n<response>\nhello world\n</response>\n"]
    with saying(tokenizer, *parts, parser="ernie_x1") as llm:
        assert same(llm, thinking()).text == "hello world"
    with saying(tokenizer, *parts) as llm:
        assert same(llm, thinking()).text == "<response>\nhello world\n</response>\n"
    with pytest.raises(ConfigError, match="no reasoning parser"):
        saying(tokenizer, "cat", parser="qwen3")


def test_text_that_spells_the_end_of_thinking_is_text(tokenizer: Tokenizer) -> None:
    spelled = [f"the {piece}" for piece in ("<", "/think", ">")]
    with saying(tokenizer, "</", "think", ">", *spelled, "</think>", "hello</", "think", ">") as llm:
        whole = same(llm, thinking())
    assert whole.reasoning == "</think>the <the /thinkthe >" and whole.text == "hello</think>"


def test_newlines_before_the_answer_stop_nothing(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "cat", "</think>", "\n\nhello\n\nworld") as llm:
        assert same(llm, thinking(stop=("\n\n",))).text == "hello"


def test_a_grammar_binds_the_answer_and_not_the_thinking(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat", "</think>", "hello world") as llm:
        choice = thinking(constraint=Constraint("choice", '["yes", "no"]'))
        whole = same(llm, choice)
        assert whole.reasoning == "the cat" and whole.text in ("yes", "no")
        schema = json.dumps(
            {
                "type": "object",
                "properties": {"a": {"type": "boolean"}},
                "required": ["a"],
                "additionalProperties": False,
            }
        )
        whole = same(llm, thinking(constraint=Constraint("json_schema", schema), max_tokens=80))
        assert isinstance(json.loads(whole.text)["a"], bool)
        with pytest.raises(GrammarError):
            llm.chat(ASK, thinking(constraint=Constraint("regex", "(")))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "value", "shape"),
    [
        ("regex", "(cat|mat)( sat){1,3}[.!]", r"(cat|mat)( sat){1,3}[.!]"),
        ("grammar", 'start: word ("," word)*\nword: "yes" | "no"', r"(yes|no)(,(yes|no))*"),
        ("choice", '["hello world", "猫"]', "hello world|猫"),
        ("json_object", "", r"\{.*\}"),
    ],
)
def test_a_constraint_holds_at_any_temperature(
    tokenizer: Tokenizer, kind: str, value: str, shape: str, seed: int
) -> None:
    """The script's row is nearly flat at temperature 2, so everything that is allowed may be drawn."""
    params = SamplingParams(temperature=2.0, seed=seed, thinking="on", max_tokens=300,
                            constraint=Constraint(kind, value), thinking_budget=5)  # type: ignore[arg-type]  # fmt: skip
    with saying(tokenizer, "the cat", "</think>", "hello world") as llm:
        whole = same(llm, params)
    assert whole.finish_reason == "length" or re.fullmatch(shape, whole.text, re.DOTALL), whole.text
    if kind != "json_object":
        assert whole.finish_reason == "stop"
    elif whole.finish_reason == "stop":
        assert isinstance(json.loads(whole.text), dict)


def test_n_choices_and_their_usage(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "cat", "</think>", "hello") as llm:
        whole = llm.chat(ASK, thinking(n=3))
    assert [whole.text, *(c.text for c in whole.choices)] == ["hello"] * 3
    assert whole.usage.completion_tokens == 3 * whole.choices[0].usage.completion_tokens


def test_bad_words_bias_and_logprobs(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "cat", "</think>", "hello") as llm:
        banned = same(llm, thinking(bad_words=("hello",), max_tokens=8))
        assert "hello" not in banned.text
        scored = llm.chat(ASK, thinking(logprobs=2, prompt_logprobs=1))
    assert [entry.token_id for entry in scored.logprobs] == list(scored.token_ids)
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in scored.logprobs)
    assert len(scored.prompt_logprobs) == scored.usage.prompt_tokens and scored.prompt_logprobs[0] is None


def test_min_tokens_holds_back_the_end(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "hello", is_thinking=False) as llm:
        whole = same(llm, SamplingParams(temperature=0, thinking="off", min_tokens=9, max_tokens=12))
    assert whole.usage.completion_tokens >= 9


def test_cancel_and_an_abandoned_stream_free_everything(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat sat " * 9, step_seconds=0.002) as llm:
        for index in range(20):
            stream = llm.stream(ASK, thinking(max_tokens=4000), request_id=f"r{index}")
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        stream = llm.stream(ASK, thinking(ignore_eos=True, max_tokens=4000), request_id="last")
        next(stream)
        llm.cancel("last")
        assert list(stream)[-1].finish_reason == "abort"
        llm.chat(ASK, thinking(max_tokens=1))
        assert llm.stats()["running"] == 0 and llm.stats()["pages_held"] == 0


def test_answer_now(tokenizer: Tokenizer) -> None:
    varied = " ".join(f"{i} cat" for i in range(300))
    with saying(tokenizer, varied, "</think>", "hello", step_seconds=0.001) as llm:
        stream = llm.stream(ASK, thinking(max_tokens=1500), request_id="r")
        first = next(stream)
        llm.answer_now("r")
        rest = list(stream)
    ids = [token for delta in [first, *rest] for token in delta.token_ids]
    assert tokenizer.special_id("</think>") in ids[:500]


def test_the_death_of_the_engine_reaches_everyone(tokenizer: Tokenizer) -> None:
    def dies(ids: object) -> int:
        raise RuntimeError("out of ink")

    llm = LLM.scripted(tokenizer, dies)
    with pytest.raises(EngineError, match="out of ink"):
        llm.chat(ASK)
    assert not llm.is_alive
    with pytest.raises(EngineError, match="stopped"):
        llm.chat(ASK)


def test_those_still_waiting_hear_of_the_death_too(tokenizer: Tokenizer) -> None:
    def dies(ids: object) -> int:
        time.sleep(0.05)
        raise RuntimeError("out of ink")

    async def run(llm: LLM) -> list[object]:
        asked = (llm.achat(ASK, request_id=f"r{i}") for i in range(20))
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)

    results = asyncio.run(run(LLM.scripted(tokenizer, dies, max_sequences=2)))
    assert all(isinstance(result, EngineError) for result in results)


def test_async_streams_and_many_at_once(tokenizer: Tokenizer) -> None:
    async def run(llm: LLM) -> list[Completion]:
        return await asyncio.gather(*(llm.achat(ASK, thinking()) for _ in range(8)))

    with saying(tokenizer, "cat", "</think>", "hello") as llm:
        assert {answer.text for answer in asyncio.run(run(llm))} == {"hello"}


def test_questions_are_answered_in_one_step_each(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "no", is_thinking=False) as llm:
        decisions = llm.decide(ASK, [Question("", ("yes", "no")), Question("", ("hello world", "no"))])
    assert [decision.answer for decision in decisions] == ["no", "no"]
    assert sum(decisions[0].probabilities.values()) == pytest.approx(1)
    assert llm.stats()["generated_tokens"] <= 8


def test_bad_asks_are_refused_before_they_run(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "cat", num_pages=8) as llm:
        with pytest.raises(PromptTooLong):
            llm.chat([Message.of("user", "cat " * 500)])
        with pytest.raises(ConfigError):
            llm.chat(ASK, SamplingParams(logit_bias={1 << 20: 1.0}))


def test_counting_agrees_with_usage(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "cat") as llm:
        counted = llm.count_tokens(ASK, thinking="on").prompt_tokens
        assert counted == llm.chat(ASK, thinking(max_tokens=1)).usage.prompt_tokens


def test_an_id_is_used_once_at_a_time_and_cancelled_before_it_is_taken_in(tokenizer: Tokenizer) -> None:
    with saying(tokenizer, "the cat sat " * 9, step_seconds=0.002) as llm:
        first = llm.stream(ASK, thinking(ignore_eos=True, max_tokens=4000), request_id="r")
        next(first)
        with pytest.raises(ConfigError, match="in use"):
            next(llm.stream(ASK, thinking(), request_id="r"))
        llm.cancel("r")
        assert list(first)[-1].finish_reason == "abort"
        llm.chat(ASK, thinking(max_tokens=1), request_id="r")


def test_a_request_that_breaks_ends_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from duomo.engine.answer import Answer

    step = Answer.step

    def breaks(answer: Answer, logits: object) -> int:
        if answer._params.seed == 13:
            raise GrammarError("the constraint cannot be used")
        return step(answer, logits)  # type: ignore[arg-type]

    monkeypatch.setattr(Answer, "step", breaks)
    with saying(tokenizer, "hello world", is_thinking=False) as llm:
        with pytest.raises(EngineError, match="cannot be used"):
            llm.chat(ASK, SamplingParams(thinking="off", seed=13))
        assert llm.is_alive and llm.stats()["pages_held"] == 0
        assert llm.chat(ASK, SamplingParams(thinking="off")).text.endswith("hello world")


@pytest.mark.parametrize(("question", "mode"), [("How many are 12 + 7?", "on"), ("Hello there", "off")])
def test_auto_says_what_was_decided(tokenizer: Tokenizer, question: str, mode: str) -> None:
    with saying(tokenizer, "cat", "</think>", "hello", is_thinking=mode == "on") as llm:
        asked = [Message.of("user", question)]
        whole = llm.chat(asked, SamplingParams(temperature=0, thinking="auto", max_tokens=9))
        last = list(llm.stream(asked, SamplingParams(temperature=0, thinking="auto", max_tokens=9)))[-1]
    assert whole.thinking == last.thinking == mode
    assert (whole.usage.reasoning_tokens > 0) == (mode == "on")
