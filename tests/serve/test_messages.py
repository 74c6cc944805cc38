"""Anthropic's dialect and the decisions endpoint."""

import base64
import json

import pytest

from tests.serve.conftest import picture, picture_url

ASK = {"max_tokens": 200, "messages": [{"role": "user", "content": "hi"}]}


def events(server, body):
    with server.client.stream("POST", "/v1/messages", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]


def test_whole_and_streamed_agree_with_and_without_thinking(server):
    for thinking in (None, {"type": "enabled", "budget_tokens": 100}):
        body = {**ASK, "thinking": thinking}
        whole = server.client.post("/v1/messages", json=body).json()
        got = events(server, body)
        assert whole["type"] == "message" and whole["stop_reason"] == "end_turn"
        kinds = [block["type"] for block in whole["content"]]
        assert kinds == (["thinking", "text"] if thinking else ["text"])
        assert [e["type"] for e in got][:2] == ["message_start", "content_block_start"]
        assert [e["type"] for e in got][-2:] == ["message_delta", "message_stop"]
        text = "".join(e["delta"].get("text", "") for e in got if e["type"] == "content_block_delta")
        assert text == whole["content"][-1]["text"] == server.backend.answer
        assert got[-2]["usage"] == whole["usage"]
        starts = [e["index"] for e in got if e["type"] == "content_block_start"]
        assert (
            starts
            == [e["index"] for e in got if e["type"] == "content_block_stop"]
            == list(range(len(kinds)))
        )


def test_tools_there_and_back(server):
    body = {
        **ASK,
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "any"},
    }
    whole = server.client.post("/v1/messages", json=body).json()
    use = whole["content"][-1]
    assert whole["stop_reason"] == "tool_use" and use["name"] == "look" and use["input"] == {"text": "脚本"}
    pieces = [
        e["delta"]["partial_json"] for e in events(server, body) if e.get("delta", {}).get("partial_json")
    ]
    assert json.loads("".join(pieces)) == use["input"]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "a cat"}
    history = [
        *ASK["messages"],
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    assert server.client.post("/v1/messages", json={**ASK, "messages": history}).status_code == 200


def test_pictures_are_counted(server):
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(picture()).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "what?"}]
    body = {**ASK, "messages": [{"role": "user", "content": content}]}
    count = server.client.post("/v1/messages/count_tokens", json={"messages": body["messages"]}).json()
    assert (
        count["input_tokens"] == server.client.post("/v1/messages", json=body).json()["usage"]["input_tokens"]
    )
    assert count["input_tokens"] > 64
    source["data"] = "@@"
    assert server.client.post("/v1/messages", json=body).status_code == 400


def test_decisions_answer_each_question_in_its_own_shape(server):
    questions = [
        {"type": "predicate", "instructions": "It is red.", "name": "red"},
        {
            "type": "choice",
            "instructions": [{"type": "input_text", "text": "What is it?"}],
            "choices": [{"value": "cat", "description": "it purrs"}, {"value": True}, {"value": "cow"}],
        },
        {"type": "score", "instructions": "How red?", "levels": [{"label": "pale"}, {"label": "deep"}]},
    ]
    picture_part = {"type": "input_image", "image_url": picture_url()}
    data = {"type": "input_json", "data": {"a": [1]}}
    body = {"input": [{"role": "user", "content": [picture_part, data]}], "questions": questions}
    got = server.client.post("/v1/decisions", json=body).json()
    red, what, how = got["answers"]
    assert red == {"type": "predicate", "name": "red", "probability": 0.9}
    assert (what["choice"], what["confidence"], what["name"]) == ("cat", 0.9, None)
    assert [p["value"] for p in what["probabilities"]] == ["cat", True, "cow"]
    assert [(p["label"], p["value"]) for p in how["probabilities"]] == [("pale", 0), ("deep", 1)]
    assert how["score"] == pytest.approx(0.1) and got["usage"]["input_tokens_details"]["image_tokens"] == 64
    assert server.client.post("/v1/decisions", json={**body, "input": "a text"}).status_code == 200
    for wrong in (
        [],
        [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}],
        [{"type": "choice", "instructions": "x", "choices": [{"value": "true"}, {"value": True}]}],
        [{"type": "score", "instructions": "x", "levels": []}],
    ):
        assert server.client.post("/v1/decisions", json={**body, "questions": wrong}).status_code == 400


def test_decisions_take_pictures_in_instructions_and_calls_of_custom_tools(start):
    server = start()
    image = {"type": "input_image", "image_url": picture_url(), "detail": "low"}
    text = lambda said: {"type": "input_text", "text": said}  # noqa: E731
    questions = [
        {"type": "predicate", "instructions": [text("Like this"), image, text("or not?"), text("Think.")]},
        {"type": "predicate", "instructions": [image]},
        {"type": "predicate", "instructions": [text("Is it"), text("red?")]},
    ]
    turns = [
        {"role": "user", "content": "Look at it."},
        {"type": "custom_tool_call", "call_id": "c1", "name": "look", "input": "the door"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": [text("a door"), image]},
        {"role": "user", "content": "Well?"},
    ]
    got = server.client.post("/v1/decisions", json={"input": turns, "questions": questions})
    assert got.status_code == 200, got.text
    first, second, third = server.backend.questions
    assert [type(part).__name__ for part in first.lead] == ["TextPart", "ImagePart"]
    assert first.lead[0].text == "Like this" and first.text == "or not?\nThink.\nAnswer Yes or No."
    assert len(second.lead) == 1 and second.text == "\nAnswer Yes or No."
    assert not third.lead and third.text == "Is it\nred?\nAnswer Yes or No."
    many = [{"type": "predicate", "instructions": [image] * 9}] * 2
    refused = server.client.post("/v1/decisions", json={"input": "x", "questions": many})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "too_many_media"
    broken = [{"type": "predicate", "instructions": [{**image, "image_url": "data:image/png;base64,AAAA"}]}]
    for wrong, status in ((broken, 415), ([{"type": "predicate", "instructions": [{"type": "x"}]}], 400)):
        body = {"input": "x", "questions": wrong}
        assert server.client.post("/v1/decisions", json=body).status_code == status
