"""Behaviours C (equivalences), H (thinking) and I (tools) of the chat endpoint, on the wire."""

import base64
import itertools

import msgspec
import pytest

from tests.serve.conftest import picture_url

SEE = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": picture_url()}}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def joined(events, field, index=0):
    deltas = [c["delta"] for e in events if e != "[DONE]" for c in e["choices"] if c["index"] == index]
    return "".join(delta.get(field) or "" for delta in deltas)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"enable_thinking": False},
        {"thinking_budget": 3},
        {"max_tokens": 4, "thinking_budget": 4},
        {"stop": ["脚本"], "enable_thinking": False},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 1},
    ],
)
def test_C1_H4_a_stream_joined_is_the_whole_answer(server, fields):
    whole = server.ask(**fields).json()
    events = server.events(**fields, stream_options={"include_usage": True})
    assert events[-1] == "[DONE]" and events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"] and events[-2]["thinking"] == whole["thinking"]
    for choice in whole["choices"]:
        index, message = choice["index"], choice["message"]
        assert joined(events, "content", index) == message["content"]
        assert joined(events, "reasoning_content", index) == (message["reasoning_content"] or "")
        finishes = [
            c["finish_reason"]
            for e in events[:-1]
            for c in e["choices"]
            if c["index"] == index and c["finish_reason"]
        ]
        assert finishes == [choice["finish_reason"]]
        if fields.get("logprobs"):
            streamed = [
                t
                for e in events[:-1]
                for c in e["choices"]
                if c["logprobs"]
                for t in c["logprobs"]["content"]
            ]
            assert streamed == choice["logprobs"]["content"] and streamed
    assert len(whole["choices"]) == fields.get("n", 1)


def test_C1_the_opening_chunk_has_the_role_and_usage_is_null_until_the_last(server):
    events = server.events(stream_options={"include_usage": True}, n=2)
    for index in (0, 1):
        first = next(c for e in events[:-1] for c in e["choices"] if c["index"] == index)
        assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(event["usage"] is None for event in events[:-2])
    assert all("usage" not in event for event in server.events()[:-1])


def test_C8_usage_counts_pictures_and_equals_the_count_endpoint(server):
    body = {"messages": [{"role": "user", "content": SEE}]}
    usage = server.client.post("/v1/chat/completions", json=body).json()["usage"]
    count = server.client.post("/v1/chat/completions/input_tokens", json=body).json()
    assert usage["prompt_tokens"] == count["input_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == count["image_tokens"] == 64
    assert count["media_tokens"] == [64]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0


def test_H3_thinking_is_apart_and_switched_off_it_is_null(server):
    on, off = server.ask().json(), server.ask(enable_thinking=False).json()
    message = on["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == server.backend.thoughts
    assert message["content"] == off["choices"][0]["message"]["content"] == server.backend.answer
    assert off["choices"][0]["message"]["reasoning_content"] is None
    assert (on["thinking"]["mode"], off["thinking"]["mode"]) == ("on", "off")
    assert off["thinking"]["decided_by"] == "enable_thinking"


def test_H1_H2_a_budget_bounds_the_thinking_and_is_echoed(server):
    for budget in (1, 3):
        answer = server.ask(thinking_budget=budget).json()
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget
        assert answer["thinking"]["budget"] == budget
        assert answer["choices"][0]["message"]["content"] == server.backend.answer
    assert server.ask(thinking_budget=0).json()["thinking"]["mode"] == "off"


def test_H6_max_tokens_inside_the_thinking_ends_in_length_and_no_error(server):
    answer = server.ask(max_tokens=4, thinking_budget=4).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"] and answer["usage"]["completion_tokens"] == 4


def test_H3_reasoning_can_be_left_out_of_the_answer(server):
    message = server.ask(include_reasoning=False).json()["choices"][0]["message"]
    assert message["reasoning_content"] is None and message["content"]
    assert joined(server.events(include_reasoning=False), "reasoning_content") == ""


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_I3_I4_a_forced_call_comes_whole_and_in_deltas_that_join(server, choice):
    fields = {"tools": [TOOL], "tool_choice": choice}
    whole = server.ask(**fields).json()["choices"][0]
    call = whole["message"]["tool_calls"][0]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    assert call["function"] == {"name": "look", "arguments": '{"text": "脚本"}'}
    pieces = [
        t
        for e in server.events(**fields)[:-1]
        for c in e["choices"]
        for t in c["delta"].get("tool_calls", [])
    ]
    assert pieces[0]["id"] == call["id"] and pieces[0]["function"]["name"] == "look"
    assert "".join(p["function"].get("arguments", "") for p in pieces) == call["function"]["arguments"]


def test_the_history_of_a_call_is_taken_back(server):
    messages = [
        {"role": "user", "content": "look"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "a cat"},
    ]
    assert server.client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200


def test_answer_now_ends_the_thinking_of_a_running_request(start):
    from duomo.serve.scripted import Scripted

    server = start(Scripted(thoughts="hm " * 2000, delay_s=0.005))
    import threading

    done = []
    thread = threading.Thread(target=lambda: done.append(server.ask(request_id="chatcmpl-me").json()))
    thread.start()
    post = server.client.post
    body = {"id": "chatcmpl-me", "action": "answer_now"}
    assert server.until(lambda: post("/v1/chat/completions/control", json=body).status_code == 200)
    thread.join(10)
    assert done[0]["choices"][0]["message"]["content"] == server.backend.answer
    assert done[0]["usage"]["completion_tokens_details"]["reasoning_tokens"] < 2000
    assert post("/v1/chat/completions/control", json=body).status_code == 404


def test_models_health_and_tokens(server):
    assert server.client.get("/health").json() == {"status": "ready"}
    listed = server.client.get("/v1/models").json()["data"]
    assert listed[0]["id"] == "duomo" and "image" in listed[0]["modalities"]
    assert server.client.get("/v1/models/duomo").json() == listed[0]
    assert server.client.get("/v1/models/other").status_code == 404
    ids = server.client.post("/tokenize", json={"prompt": "héllo"}).json()
    assert ids["count"] == len(ids["tokens"])
    assert server.client.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "héllo"}


def test_text_completions_whole_and_streamed(server):
    post = server.client.post
    one = post("/v1/completions", json={"prompt": "Once", "max_tokens": 5, "echo": True}).json()
    assert one["choices"][0]["text"].startswith("Once") and one["choices"][0]["finish_reason"] == "length"
    assert one["usage"]["completion_tokens"] == 5
    two = post("/v1/completions", json={"prompt": [[1, 2], [3]], "max_tokens": 2}).json()
    assert [c["index"] for c in two["choices"]] == [0, 1] and two["usage"]["prompt_tokens"] == 3
    assert two["usage"]["completion_tokens"] == 4
    events = server.events(path="/v1/completions", prompt="Once", max_tokens=5)
    assert "Once" + "".join(e["choices"][0]["text"] for e in events[:-1]) == one["choices"][0]["text"]


def test_the_experts_of_each_token_streamed_and_whole_are_the_same(server):
    asked = {"return_experts": True, "thinking": "off"}
    whole = server.ask(**asked).json()["choices"][0]["experts"]
    parts = [
        choice["experts"]
        for chunk in server.events(**asked)
        if chunk != "[DONE]"
        for choice in chunk["choices"]
        if "experts" in choice
    ]
    assert parts[0]["start"] == 0 and all(part["layers"] == whole["layers"] for part in parts)
    assert all(a["start"] + a["tokens"] == b["start"] for a, b in itertools.pairwise(parts))
    joined = b"".join(base64.b64decode(part["ids"]) for part in parts)
    assert joined == base64.b64decode(whole["ids"])
    assert len(joined) == whole["tokens"] * whole["layers"] * whole["chosen"]
    assert "experts" not in server.ask().json()["choices"][0]
    card = server.client.get("/v1/models").json()["data"][0]
    assert card["experts"] == {"text": 16, "vision": 16} and max(set(joined) - {255}) < 16


def test_the_quick_way_to_write_a_piece_of_text_writes_the_same():
    from msgspec import UNSET

    from duomo.serve import chat, schema
    from duomo.serve.stream import event

    for model in ("tiny", "\0", 'a"b', "文"):
        for usage in (None, UNSET):
            chunk = schema.ChatChunk("chatcmpl-1", 7, model, [], usage)
            before, after = chat._around_text(chunk)
            for text in ("x", "\0", 'say "hi"\n', "日本", "\u2028</script>"):
                chunk.choices = [schema.ChunkChoice(0, schema.Delta(content=text))]
                assert before + msgspec.json.encode(text) + after == event(chunk)
