"""The whole way with real weights: a tiny random model on disk, opened, served, and asked over HTTP.

Its words are noise; what is proved is that the same question gets the same noise by every road.
"""

import http.server
import json
import threading
from dataclasses import replace

import pytest

from duomo.serve.options import Options
from tests.serve.conftest import Running, picture, picture_url
from tests.serve.test_chat import joined
from tests.tiny import TINY, tiny_model

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog"]}, "sure": {"type": "boolean"}},
    "required": ["animal", "sure"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint: random weights, and a vocabulary trained on a few words."""
    from duomo.checkpoints.save import save_model
    from duomo.model import SpecialIds
    from duomo.processing.tokenizer import Tokenizer
    from duomo.train.vocabulary import train_vocabulary

    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["the cat sat on a mat and said: hello world, yes or no?", "猫坐在垫子上。你好！", '{"a": 1}']
    train_vocabulary(words * 30, folder / "tokenizer.json", vocab_size=700)
    tokenizer = Tokenizer.load(folder)
    names = {
        "image_patch": "<|IMAGE_PLACEHOLDER|>",
        "video_patch": "<|IMAGE_PLACEHOLDER|>",
        "image_start": "<|IMAGE_START|>",
        "image_end": "<|IMAGE_END|>",
        "video_start": "<|VIDEO_START|>",
        "video_end": "<|VIDEO_END|>",
    }
    ids = SpecialIds(
        bos=tokenizer.special_id("<|begin_of_sentence|>"),
        eos=tokenizer.eos_ids[0],
        **{field: tokenizer.special_id(name) for field, name in names.items()},
    )
    save_model(tiny_model(replace(TINY, vocab_size=tokenizer.vocab_size, ids=ids)), folder)
    return folder


@pytest.fixture(scope="module")
def real(folder, tmp_path_factory):
    import asyncio

    from duomo.serve.engine import open_backend

    files = tmp_path_factory.mktemp("files")
    (files / "a.png").write_bytes(picture(70, 60, "blue"))
    options = Options(
        model=str(folder),
        allow_private_media=True,
        allowed_local_media_path=str(files),
        thinking="off",
        kv_mb=64,
    )
    running = Running(asyncio.run(open_backend(options)), options)
    running.files = files
    yield running
    running.stop()
    running.backend.llm.close()


def see(url, text="What is it?", **fields):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], **GREEDY, **fields}


def answer(real, body):
    got = real.client.post("/v1/chat/completions", json=body)
    assert got.status_code == 200, got.text
    return got.json()


def test_c_a_picture_by_data_http_and_file_gives_the_same_answer(real):
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


def test_c_stream_and_whole_and_count_agree(real):
    body = see(picture_url(width=80, height=80))
    whole = answer(real, body)
    events = real.events(**{**body, "stream_options": {"include_usage": True}})
    assert joined(events, "content") == whole["choices"][0]["message"]["content"]
    count = real.client.post("/v1/chat/completions/input_tokens", json=body).json()
    assert count["input_tokens"] == whole["usage"]["prompt_tokens"] == events[-2]["usage"]["prompt_tokens"]
    assert count["image_tokens"] == whole["usage"]["prompt_tokens_details"]["image_tokens"]


def test_c_a_prompt_seen_before_is_cached_and_answers_the_same(real):
    body = {"messages": [{"role": "user", "content": "the cat sat on a mat. " * 8}], **GREEDY}
    first, second = answer(real, body), answer(real, body)
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_c_four_at_once_answer_as_if_alone(real):
    body = {"messages": [{"role": "user", "content": "yes or no?"}], **GREEDY}
    alone = answer(real, body)["choices"]
    out = []
    threads = [threading.Thread(target=lambda: out.append(answer(real, body)["choices"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == [alone] * 4


def test_c_n_choices_with_one_seed_are_reproducible(real):
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


def test_h_a_budget_is_kept_by_the_model(real):
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
def test_i_a_forced_call_is_valid_at_any_temperature(real, choice):
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


def test_a_schema_holds_at_any_temperature_and_a_bad_one_is_a_400(real):
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


def test_b_leaving_frees_the_pages(real):
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    with real.client.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_bytes())
    assert real.until(lambda: real.backend.gauges()["running"] == 0, 5)


def test_d_bad_pictures_and_ids_out_of_range_are_4xx(real):
    cut = picture_url(width=64, height=64)[:-120]
    bomb_free = [cut, "data:image/png;base64,iVBORw0KGgo="]
    for url in bomb_free:
        got = real.client.post("/v1/chat/completions", json=see(url))
        assert 400 <= got.status_code < 500 and "Traceback" not in got.text, got.text
    for body in ({"prompt": [10**7]}, {"prompt": "x", "logit_bias": {"99999999": 1}}):
        assert real.client.post("/v1/completions", json=body).status_code == 400


def test_logprobs_have_tokens_bytes_and_alternatives(real):
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


def test_an_application_is_made_of_an_open_llm(real):
    from duomo import create_app

    assert create_app(real.backend.llm).state.server.state == "ready"
