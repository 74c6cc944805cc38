"""Behaviours B, C, F, H and I where a real (tiny, random) model and its engine decide them."""

import asyncio
import json
import threading

import httpx
import pytest

from duomo.serve.options import Options
from tests.serve.conftest import GREEDY, Running, answer, picture_url, sample, see

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "name": {"type": "string", "maxLength": 6}},
    "required": ["animal", "name"],
    "additionalProperties": False,
}
LOOK = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
TAKE = {"type": "function", "function": {"name": "take", "parameters": SCHEMA}}
CHAT = "/v1/chat/completions"
WORDS = "你好 héllo \U0001f600"


def hello(text="hello world", **fields):
    return {"messages": [{"role": "user", "content": text}], **GREEDY, **fields}


@pytest.fixture
def small(folder):
    """`small(**options)`: a server of its own, its engine in this process."""
    running = []

    def begin(**options):
        from duomo.serve.engine import open_backend

        asked = Options(**{"model": str(folder), "thinking": "off", "engine_process": False, **options})
        running.append(Running(asyncio.run(open_backend(asked)), asked))
        return running[-1]

    yield begin
    for server in running:
        server.stop()
        asyncio.run(server.backend.close())


def in_background(ask, number):
    got = []
    threads = [threading.Thread(target=lambda i=i: got.append(ask(i))) for i in range(number)]
    for thread in threads:
        thread.start()
    return threads, got


def held(server):
    return server.client.get("/load").json()["pages_held"]


# ---- B: cancelling ----


def slowed(server, seconds=0.02):
    """The engine's steps take longer, so that something can happen during them; says when one has begun."""
    runner, begun = server.backend.llm.engine.runner, threading.Event()
    execute = runner.execute

    def slowly(*asked):
        begun.set()
        threading.Event().wait(seconds)
        return execute(*asked)

    runner.execute = slowly
    return begun


def test_B1_B2_leaving_gives_back_every_page_streamed_and_whole(small):
    server = small(kv_mb=64)
    slowed(server)
    body = hello(max_tokens=3000)
    with server.client.stream("POST", CHAT, json={**body, "stream": True}) as leaving:
        lines = leaving.iter_lines()  # kept: httpx ends the request with its iterator
        next(lines)
        assert held(server) > 0
    assert server.until(lambda: held(server) == 0 and server.backend.gauges()["running"] == 0)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(CHAT, json=body, timeout=1.0)
    assert server.until(lambda: held(server) == 0 and server.backend.gauges()["running"] == 0)


def test_B3_a_request_that_waits_is_cancelled_where_it_stands(small):
    server = small(max_num_seqs=1, kv_mb=64)
    slowed(server)
    with server.client.stream("POST", CHAT, json=hello(max_tokens=3000, stream=True)) as first:
        lines = first.iter_lines()
        next(lines)
        threads, got = in_background(
            lambda i: server.client.post(CHAT, json=hello(request_id="chatcmpl-waiting")).json(), 1
        )
        assert server.until(lambda: server.backend.gauges()["waiting"] == 1)
        body = {"id": "chatcmpl-waiting", "action": "cancel"}
        assert server.client.post(CHAT + "/control", json=body).status_code == 200
        threads[0].join(10)
        assert got[0]["choices"][0]["finish_reason"] == "abort"
        assert server.backend.gauges()["running"] == 1  # the one that ran goes on
    assert server.until(lambda: held(server) == 0)


def test_B4_leaving_during_the_prefill_of_a_picture_frees_it(small):
    server = small(max_num_batched_tokens=16, kv_mb=64, keep_alive_s=0.1)
    begun = slowed(server, 0.3)
    body = see(picture_url(width=400, height=400), stream=True)
    with server.client.stream("POST", CHAT, json=body) as leaving:
        lines = leaving.iter_lines()
        assert next(lines) == ": still working"  # no token has come
        assert begun.wait(20)
    assert server.until(lambda: held(server) == 0 and server.backend.gauges()["running"] == 0)


def test_B7_a_neighbour_that_leaves_changes_no_token(real):
    body = hello("yes or no?", max_tokens=40, logprobs=True)
    alone = answer(real, body)["choices"]
    threads, got = in_background(lambda i: answer(real, body)["choices"], 2)
    for _ in range(3):
        with real.client.stream("POST", CHAT, json=hello(max_tokens=500, stream=True)) as leaving:
            lines = leaving.iter_lines()
            next(lines)
    for thread in threads:
        thread.join(30)
    assert got == [alone, alone]


# ---- C: what must be the same ----


def test_C2_one_seed_gives_one_answer(real):
    body = hello(temperature=1.2, max_tokens=16)
    first, second, other = (answer(real, {**body, "seed": seed})["choices"] for seed in (5, 5, 6))
    assert first == second != other


def test_C6_logprobs_add_up_to_the_same_streamed_and_whole(real):
    whole = answer(real, hello(logprobs=True, top_logprobs=3))["choices"][0]["logprobs"]["content"]
    events = real.events(**hello(logprobs=True, top_logprobs=3))
    streamed = [
        t for e in events[:-1] for c in e["choices"] if c["logprobs"] for t in c["logprobs"]["content"]
    ]
    assert streamed == whole
    for entry in whole:  # greedy: the token is the likeliest one
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])


def test_C7_a_stop_across_tokens_cuts_the_text_and_is_not_shown(real):
    body = hello("the cat sat on a mat. ", max_tokens=40, temperature=1.0, seed=4)
    text = answer(real, body)["choices"][0]["message"]["content"]
    assert len(text) > 12
    for start in range(3, 9):
        stop = text[start : start + 3]
        cut = text[: text.index(stop)]
        choice = answer(real, {**body, "stop": stop})["choices"][0]
        assert choice["message"]["content"] == cut and choice["finish_reason"] == "stop"
        events = real.events(**{**body, "stop": stop})
        streamed = [c["delta"].get("content") or "" for e in events[:-1] for c in e["choices"]]
        assert "".join(streamed) == cut


def test_C10_pictures_of_one_size_never_share_keys_and_values(real):
    ask = lambda colour: answer(  # noqa: E731
        real, see(picture_url(width=84, height=84, colour=colour), logprobs=True)
    )
    red, blue, again = ask("red"), ask("blue"), ask("red")
    assert red["choices"] == again["choices"] != blue["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    image_tokens = blue["usage"]["prompt_tokens_details"]["image_tokens"]
    cached = blue["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached + image_tokens <= blue["usage"]["prompt_tokens"]


def test_C11_features_of_a_picture_survive_a_restart(small, tmp_path):
    body = see(picture_url(width=90, height=90, colour="green"), logprobs=True)
    first = small(encoder_cache_dir=str(tmp_path))
    before = answer(first, body)
    assert first.backend.gauges()["media_encoded"] == 1 and list(tmp_path.rglob("*"))
    second = small(encoder_cache_dir=str(tmp_path))
    assert answer(second, body)["choices"] == before["choices"]
    assert second.backend.gauges()["media_encoded"] == 0 and second.backend.gauges()["feature_hits"] == 1


# ---- F: too much ----


def test_F3_an_answer_ends_where_the_context_does(small):
    server = small(max_model_len=64, kv_mb=64)
    got = answer(server, hello(max_tokens=1000))
    assert got["choices"][0]["finish_reason"] == "length" and got["usage"]["total_tokens"] == 64


def test_F4_when_pages_run_out_requests_are_set_back_and_finish_later(small):
    from duomo.engine.opening import num_pages_in

    server = small(kv_mb=1, block_size=8, max_num_seqs=16)
    pages = int(server.backend.gauges()["pages"])
    assert pages and num_pages_in
    length = min(server.backend.facts.max_model_len // 2, max(32, pages * 8 // 4))
    alone = answer(server, hello("first", max_tokens=length))["choices"]
    threads, got = in_background(lambda i: answer(server, hello("first", max_tokens=length))["choices"], 12)
    for thread in threads:
        thread.join(120)
    assert got == [alone] * 12
    if pages * 8 < 12 * length:
        assert sample(server, "vllm:num_preemptions_total") > 0


def test_F7_a_cache_folder_that_is_full_costs_the_cache_and_nothing_else(small, tmp_path, monkeypatch):
    from duomo.engine import features

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    server = small(encoder_cache_dir=str(tmp_path))
    assert answer(server, see(picture_url(width=60, height=60)))["choices"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---- H: thinking ----


def test_H1_a_budget_closes_the_block_once_and_an_answer_follows(real):
    for budget in (1, 4, 9):
        got = answer(real, hello(max_tokens=24, thinking_budget=budget, return_token_ids=True))
        ids, usage = got["choices"][0]["token_ids"], got["usage"]
        close = real.backend.llm.tokenizer.find_special("</think>")
        assert ids.count(close) <= 1 and usage["completion_tokens_details"]["reasoning_tokens"] <= budget
        assert "</think>" not in got["choices"][0]["message"]["content"]
        assert got["choices"][0]["message"]["content"]


def test_H2_H3_no_budget_and_no_thinking_leave_no_reasoning(real):
    for off in ({"thinking_budget": 0}, {"enable_thinking": False}, {"reasoning_effort": "none"}):
        got = answer(real, hello(**off))
        assert got["choices"][0]["message"]["reasoning_content"] is None
        assert got["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize("said", ["<think>a</think>b", "</think>", "<|IMAGE_START|>", "</s>", "<tool_call>"])
def test_H5_D19_control_words_that_a_user_types_are_text(real, said):
    control = real.client.post("/tokenize", json={"prompt": said}).json()["tokens"]
    special = real.backend.llm.tokenizer.find_special(said)
    assert special is None or special not in control
    count = real.client.post(CHAT + "/input_tokens", json=hello(said)).json()
    assert count["image_tokens"] == 0
    got = answer(real, hello(said, thinking_budget=3, max_tokens=16))
    assert got["choices"][0]["message"]["content"]


def test_H7_a_grammar_binds_the_answer_and_not_the_thinking(real):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    body = hello(temperature=1.5, seed=2, max_tokens=150, ignore_eos=False)
    got = answer(real, {**body, "response_format": form, "thinking_budget": 6})
    message = got["choices"][0]["message"]
    assert got["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0 and message["reasoning_content"]
    assert json.loads(message["content"])["animal"] in ("cat", "dog")
    with pytest.raises(ValueError):
        json.loads(message["reasoning_content"])


# ---- I: tools ----


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_I1_I2_I3_I5_calls_are_valid_parallel_and_the_same_in_a_stream(real, seed):
    body = hello(
        tools=[LOOK, TAKE], tool_choice="required", temperature=2, seed=seed, max_tokens=220, ignore_eos=False
    )
    choice = answer(real, body)["choices"][0]
    calls = choice["message"]["tool_calls"]
    for call in calls:
        if choice["finish_reason"] == "tool_calls" or call is not calls[-1]:
            arguments = json.loads(call["function"]["arguments"])
            assert call["function"]["name"] in ("look", "take") and arguments["animal"] in ("cat", "dog")
    assert len({call["id"] for call in calls}) == len(calls)
    assert "tool_call" not in (choice["message"]["content"] or "")
    joined = {}
    for event in real.events(**body)[:-1]:
        for one in event["choices"]:
            for piece in one["delta"].get("tool_calls", []):
                entry = joined.setdefault(piece["index"], {"name": "", "arguments": ""})
                entry["name"] += piece["function"].get("name") or ""
                entry["arguments"] += piece["function"].get("arguments") or ""
            assert "tool_call" not in (one["delta"].get("content") or "")
    assert [joined[index] for index in sorted(joined)] == [call["function"] for call in calls]


def test_I4_arguments_may_be_in_any_script(real):
    schema = {
        "type": "object",
        "properties": {"text": {"const": WORDS}},
        "required": ["text"],
    }
    tool = {"type": "function", "function": {"name": "say", "parameters": schema}}
    body = hello(tools=[tool], tool_choice="required", max_tokens=400, parallel_tool_calls=False)
    got = answer(real, body | {"ignore_eos": False, "temperature": 1.0, "seed": 3})["choices"][0]
    call = got["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"text": WORDS}
