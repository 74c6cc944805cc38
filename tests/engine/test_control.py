"""Control of a running request, by hand: cancelled within one step, told to answer, stopped by an id."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.engine.engine import Engine
from duomo.engine.governor import MAX_PERIOD, MIN_LOOP_TOKENS, NUM_REPEATS, Governor, is_looping
from duomo.engine.request import Output, Request, SamplingParams
from tests.engine.worlds import GREEDY, THINK_END, answers, engine, picture_request, text_request, tokens

END = 2


def started(own: Engine, requests: list[Request]) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    for request in requests:
        own.submit(request, outputs[request.request_id].append)
    return outputs


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_cancelled_before_the_next_step_and_nobody_beside_it_notices(steps: int) -> None:
    """While queued, in the middle of a picture's prefill, at its last chunk and while answering."""
    gone = picture_request("gone", 1, 8, 8)  # 30 tokens
    beside = text_request("beside", 2, 9)
    expected = answers(engine(), [beside])["beside"]
    own = engine(max_step_tokens=16, has_prefix_cache=False)
    outputs = started(own, [gone, beside])
    for _ in range(steps):
        own.step()
    own.cancel("gone")
    held = len(own.scheduler.running[-1].pages) if steps == 6 else None
    own.step()
    names = [s.request.request_id for s in (*own.scheduler.running, *own.scheduler.waiting)]
    assert names == ["beside"] and outputs["gone"][-1].finish_reason == "abort"
    assert own.scheduler.pool.num_held == len(own.scheduler.running[0].pages)
    assert held is None or own.scheduler.pool.num_held <= held + 1
    said = len(outputs["gone"])
    while own.step():
        own.scheduler.check()
    assert tokens(outputs["beside"]) == expected and len(outputs["gone"]) == said
    assert own.scheduler.pool.num_held == 0 and own.runner.counters()["swapped"] == 0
    assert not own.runner._tracks, "the runner keeps nothing of it"  # type: ignore[attr-defined]


def test_a_hundred_that_come_and_go_leave_nothing() -> None:
    own = engine()
    for index in range(100):
        started(own, [picture_request(f"r{index}", index % 5, salt=str(index))])
        for _ in range(index % 3):
            own.step()
        own.cancel(f"r{index}")
    own.step()
    assert own.scheduler.pool.num_held == 0 and not own._open and not own._asked
    assert not own.scheduler.running and not own.scheduler.waiting


def test_answer_now_ends_the_thinking_with_the_very_next_token() -> None:
    thinking = replace(GREEDY, max_tokens=40, logit_bias={THINK_END: -100.0})
    own = engine()
    outputs = started(own, [text_request("r", 3, 12, params=thinking, is_thinking=True)])
    for _ in range(9):
        own.step()
    before = tokens(outputs["r"])
    own.answer_now("r")
    own.step()
    assert THINK_END not in before and tokens(outputs["r"]) == [*before, THINK_END]
    while own.step():
        pass
    assert outputs["r"][-1].num_reasoning == len(before) and len(tokens(outputs["r"])) == 40
    own.answer_now("r")  # of one that has ended: nothing
    assert not own.step()


def test_a_stop_id_ends_the_answer_and_not_the_thinking() -> None:
    whole = answers(engine(), [text_request("r", 4, 10)])["r"]
    stop = next(token for place, token in enumerate(whole) if place > 2 and token not in whole[:place])
    stopped = replace(GREEDY, stop_token_ids=(stop,))
    found = answers(engine(), [text_request("r", 4, 10, params=replace(stopped, ignore_eos=False))])["r"]
    assert found == whole[: whole.index(stop) + 1]
    late = replace(stopped, ignore_eos=False, min_tokens=whole.index(stop) + 3)
    held_back = answers(engine(), [text_request("r", 4, 10, params=late)])["r"]
    assert stop not in held_back[: late.min_tokens] and len(held_back) >= late.min_tokens
    thinking = text_request("r", 4, 10, params=replace(stopped, ignore_eos=False), is_thinking=True)
    assert answers(engine(), [thinking])["r"][: len(found)] == found != answers(engine(), [thinking])["r"]


def says_one_phrase(thoughts: list[int]) -> bool:
    """The definition, tried out: the last tokens are a phrase of up to 64, said 6 times and for 48 tokens."""
    for period in range(1, MAX_PERIOD + 1):
        length = max(NUM_REPEATS * period, MIN_LOOP_TOKENS)
        tail = thoughts[-length:]
        if len(tail) == length and tail == (tail[-period:] * length)[-length:]:
            return True
    return False


@settings(deadline=None, max_examples=200)
@given(
    head=st.lists(st.integers(0, 3), max_size=40),
    phrase=st.lists(st.integers(0, 3), min_size=1, max_size=70),
    times=st.integers(1, 60),
    tail=st.lists(st.integers(0, 3), max_size=3),
)
def test_a_loop_is_seen_where_it_is_one_by_definition(head, phrase, times, tail) -> None:
    thoughts = [*head, *(phrase * times)[:420], *tail]
    assert is_looping(thoughts) == says_one_phrase(thoughts)


@settings(deadline=None, max_examples=200)
@given(
    drawn=st.lists(st.integers(0, 6), min_size=30, max_size=30),
    budget=st.integers(0, 12),
    wrap_up=st.lists(st.integers(10, 12), max_size=4),
)
def test_no_more_than_the_budget_is_thought_and_then_it_ends_once(drawn, budget, wrap_up) -> None:
    """Whatever the model would say: 1 is its own `</think>`, 2 the end of an answer."""
    governor = Governor(True, 1, budget, wrap_up)
    said: list[int] = []
    for token in drawn:
        forced = governor.next_token()
        chosen = governor.replace(token, (END,)) if forced is None else forced
        governor.accept(chosen)
        said.append(chosen)
        if not governor.is_thinking:
            break
    assert said.count(1) == 1 == said.count(said[-1] if said[-1] == 1 else -1) and len(said) - 1 <= budget
    natural = next((place for place, token in enumerate(drawn) if token in (1, END)), len(drawn))
    words = wrap_up if len(wrap_up) < budget else []
    if natural < budget - len(words):
        assert said == [*drawn[:natural], 1] and governor.cause in ("", "end")
    else:
        assert said == [*drawn[: budget - len(words)], *words, 1] and governor.cause == "budget"


def test_a_sampled_answer_keeps_its_budget_in_company() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, thinking="on", seed=3)
    requests = [
        text_request(f"r{n}", n, 8, params=replace(params, thinking_budget=n), is_thinking=True)
        for n in (0, 1, 5, 9)
    ]
    for request in requests:
        found = answers(engine(max_step_tokens=11), requests)[request.request_id]
        assert THINK_END in found and found.index(THINK_END) <= int(request.params.thinking_budget or 0)
