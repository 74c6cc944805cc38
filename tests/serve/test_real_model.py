"""The whole way with real weights: a tiny random model on disk, opened, served, and asked over HTTP.

Its words are noise; what is proved is that the same question gets the same noise by every road.
"""

import http.server
import json
import threading

import pytest

from tests.serve.conftest import GREEDY, answer, picture_url, see
from tests.serve.test_chat import joined

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "sure": {"type": "boolean"}},
    "required": ["animal", "sure"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def test_C9_C10_a_picture_by_data_http_and_file_gives_the_same_answer(real):
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(real.files))  # noqa: E731
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    urls = [
        picture_url(width=70, height=60, colour="blue"),
        f"http://127.0.0.1:{site.server_port}/a.png",
        f"file://{real.files}/a.png",
    ]
    answers = [answer(real, see(url, return_token_ids=True)) for url in urls]
    site.shutdown()
    ids = [a["choices"][0]["token_ids"] for a in answers]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 12
    other = answer(real, see(picture_url(width=70, height=60, colour="white"), return_token_ids=True))
    assert other["choices"][0]["token_ids"] != ids[0]  # same text, another picture: nothing is shared
    assert answers[0]["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_C1_C8_stream_and_whole_and_count_agree(real):
    body = see(picture_url(width=80, height=80))
    whole = answer(real, body)
    events = real.events(**{**body, "stream_options": {"include_usage": True}})
    assert joined(events, "content") == whole["choices"][0]["message"]["content"]
    count = real.client.post("/v1/chat/completions/input_tokens", json=body).json()
    assert count["input_tokens"] == whole["usage"]["prompt_tokens"] == events[-2]["usage"]["prompt_tokens"]
    assert count["image_tokens"] == whole["usage"]["prompt_tokens_details"]["image_tokens"]


def test_C4_a_prompt_seen_before_is_cached_and_answers_the_same(real):
    body = {"messages": [{"role": "user", "content": "the cat sat on a mat. " * 8}], **GREEDY}
    first, second = answer(real, body), answer(real, body)
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_C3_four_at_once_answer_as_if_alone(real):
    body = {"messages": [{"role": "user", "content": "yes or no?"}], **GREEDY}
    alone = answer(real, body)["choices"]
    out = []
    threads = [threading.Thread(target=lambda: out.append(answer(real, body)["choices"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == [alone] * 4


def test_C2_C5_n_choices_with_one_seed_are_reproducible(real):
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "n": 3,
        "seed": 7,
        "temperature": 1.5,
        "max_tokens": 8,
    }
    first, second = answer(real, body), answer(real, body)
    texts = [c["message"]["content"] for c in first["choices"]]
    assert texts == [c["message"]["content"] for c in second["choices"]] and len(set(texts)) > 1


def test_H1_a_budget_is_kept_by_the_model(real):
    for budget in (1, 5):
        body = {
            "messages": [{"role": "user", "content": "hi"}],
            **GREEDY,
            "max_tokens": 24,
            "thinking_budget": budget,
        }
        got = answer(real, body)
        assert 0 < got["usage"]["completion_tokens_details"]["reasoning_tokens"] <= budget
        assert got["choices"][0]["message"]["content"] and got["thinking"]["mode"] == "on"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_I1_a_forced_call_is_valid_at_any_temperature(real, choice):
    body = {
        "messages": [{"role": "user", "content": "look"}], "tools": [TOOL], "tool_choice": choice,
        "temperature": 2, "seed": 3, "max_tokens": 120, "parallel_tool_calls": False,
    }  # fmt: skip
    got = answer(real, body)["choices"][0]
    call = got["message"]["tool_calls"][0]["function"]
    arguments = json.loads(call["arguments"])
    assert (
        call["name"] == "look"
        and arguments["animal"] in ("cat", "dog")
        and got["finish_reason"] == "tool_calls"
    )


def test_D7_a_schema_holds_at_any_temperature_and_a_bad_one_is_a_400(real):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 2, "max_tokens": 120, "seed": 1}
    text = answer(real, {**body, "response_format": form})["choices"][0]["message"]["content"]
    assert json.loads(text)["animal"] in ("cat", "dog")
    for wrong in (
        {"guided_regex": "("},
        {"guided_grammar": "start: ???"},
        {"guided_json": {"type": "nonsense"}},
    ):
        got = real.client.post("/v1/chat/completions", json={**body, **wrong})
        assert got.status_code == 400 and got.json()["error"]["code"] == "invalid_grammar", (wrong, got.text)


def test_B1_leaving_frees_the_pages(real):
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    with real.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_bytes())
    assert real.until(lambda: real.backend.gauges()["running"] == 0, 5)


def test_D9_E5_bad_pictures_and_ids_out_of_range_are_4xx(real):
    cut = picture_url(width=64, height=64)[:-120]
    bomb_free = [cut, "data:image/png;base64,iVBORw0KGgo="]
    for url in bomb_free:
        got = real.client.post("/v1/chat/completions", json=see(url))
        assert 400 <= got.status_code < 500 and "Traceback" not in got.text, got.text
    for body in ({"prompt": [10**7]}, {"prompt": "x", "logit_bias": {"99999999": 1}}):
        assert real.client.post("/v1/completions", json=body).status_code == 400


def test_C6_logprobs_have_tokens_bytes_and_alternatives(real):
    got = answer(
        real, {"messages": [{"role": "user", "content": "hi"}], **GREEDY, "logprobs": True, "top_logprobs": 2}
    )
    entries = got["choices"][0]["logprobs"]["content"]
    assert len(entries) == 12
    for entry in entries:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]


def test_decisions_about_a_picture_sum_to_one(real):
    questions = [
        {"type": "predicate", "instructions": "It is blue."},
        {"type": "choice", "instructions": "What is it?", "choices": [{"value": "cat"}, {"value": "dog"}]},
        {"type": "score", "instructions": "How blue?", "levels": [{"label": str(n)} for n in range(4)]},
    ]
    part = {"type": "input_image", "image_url": picture_url(width=60, height=60)}
    body = {"input": [{"role": "user", "content": [part]}], "questions": questions}
    got = real.client.post("/v1/decisions", json=body)
    assert got.status_code == 200, got.text
    blue, what, how = got.json()["answers"]
    assert 0 < blue["probability"] < 1 and got.json()["usage"]["input_tokens_details"]["image_tokens"] > 0
    for answer_ in (what, how):
        shares = [row["probability"] for row in answer_["probabilities"]]
        assert abs(sum(shares) - 1) < 1e-6 and max(shares) == answer_["confidence"]
    assert 0 <= how["score"] <= 3


def test_a_picture_in_instructions_changes_the_decision(real):
    ask = {"type": "input_text", "text": "Is the first like this one?"}

    def probability(width):
        part = {"type": "input_image", "image_url": picture_url(width=width, height=60)}
        body = {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": picture_url()}]}],
            "questions": [{"type": "predicate", "instructions": [part, ask]}],
        }
        got = real.client.post("/v1/decisions", json=body)
        assert got.status_code == 200, got.text
        return got.json()["answers"][0]["probability"]

    assert probability(60) == probability(60) != probability(120)


def test_an_application_is_made_of_an_open_llm(real):
    from duomo import create_app

    assert create_app(real.backend.llm).state.server.state == "ready"
