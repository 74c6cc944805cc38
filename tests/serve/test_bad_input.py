"""Behaviours D (bad input), E (media) and J (security): always an envelope, never a 5xx, never an inside."""

import base64
import json

import pytest

from tests.serve.conftest import picture, picture_url

OK = [{"role": "user", "content": "hi"}]


def with_image(url, role="user"):
    return {"messages": [{"role": role, "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


def assert_envelope(response, status=None):
    assert 400 <= response.status_code < 500 and (status is None or response.status_code == status), (
        response.text
    )
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    for inside in ("Traceback", ".py", "0x7f", "/work", "/usr", "/root", "site-packages"):
        assert inside not in response.text
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"", b"not json", b"[1]", b"null", b'"text"', b"{", b'{"messages": ' + b"[" * 100_000,
        b'{"a":' * 10_000, b"\xff\xfe{}", b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
        b'{"messages":[{"role":"user","content":"\\ud800"}]}', b'{"temperature": NaN, "messages": []}',
    ],
)  # fmt: skip
def test_D1_D2_D12_D16_a_body_that_is_no_request(server, body):
    sent = server.client.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert_envelope(sent, 400)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, None),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": 100_000}, "n"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"tools": [{"type": "function"}]}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"reasoning_max_tokens": -1}, "reasoning_max_tokens"),
    ],
)
def test_D3_to_D15_a_wrong_field_is_named(server, fields, param):
    error = assert_envelope(server.client.post("/v1/chat/completions", json={"messages": OK, **fields}), 400)
    assert param is None or error["param"] == param


def test_D18_a_long_body_and_another_content_type(start):
    server = start(max_body_mb=0.01)
    assert_envelope(server.ask("x" * 50_000), 413)
    big = server.client.post("/v1/chat/completions", content=iter([b"x" * 9000] * 4))
    assert_envelope(big, 413)
    text = server.client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert_envelope(text, 415)


def test_D14_unknown_paths_methods_and_models(start):
    server = start(served_model_name=("ernie",))
    assert_envelope(server.client.get("/nothing/here"), 404)
    wrong = server.client.get("/v1/chat/completions")
    assert_envelope(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    assert assert_envelope(server.ask(model="gpt"), 404)["code"] == "model_not_found"
    for name in ("ernie", "default"):
        assert server.ask(model=name).status_code == 200


def test_D3_unknown_fields_are_answered_and_named(server):
    answer = server.ask(service_tier="x", frobnicate=1, chat_template_kwargs={"style": 2})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "service_tier, frobnicate, chat_template_kwargs.style"
    assert server.ask(**{"evil\r\nX: y": 1}).headers["x-ignored-fields"] == "1 fields with odd names"


@pytest.mark.parametrize("stream", [False, True])
def test_F2_a_prompt_over_the_context_is_a_400_streamed_and_whole(server, stream):
    error = assert_envelope(server.ask("word " * 5000, stream=stream), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "url, status",
    [
        ("data:image/png;base64,@@", 400),
        ("data:text/html;base64,PGI+", 415),
        ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), 415),
        ("data:image/tiff;base64," + base64.b64encode(b"II*\0" + bytes(50)).decode(), 415),
        ("http://127.0.0.1:1/x.png", 400),
        ("http://169.254.169.254/latest/meta-data", 400),
        ("http://0x7f000001/x.png", 400),
        ("http://[::1]/x.png", 400),
        ("file:///etc/passwd", 400),
        ("gopher://x", 400),
        ("", 400),
    ],
)
def test_E1_E2_E14_E17_E22_E24_media_that_may_not_be_fetched_or_read(server, url, status):
    assert_envelope(server.client.post("/v1/chat/completions", json=with_image(url)), status)


def test_E18_too_many_pictures_are_refused(start):
    server = start(limit_mm_per_prompt={"image": 2})
    part = {"type": "image_url", "image_url": {"url": picture_url()}}
    ask = lambda n: server.client.post(  # noqa: E731
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": [part] * n}]}
    )
    assert ask(2).status_code == 200
    assert assert_envelope(ask(3), 400)["code"] == "too_many_media"


def test_E24_a_file_is_read_under_its_root_alone(start, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    server = start(allowed_local_media_path=str(tmp_path))
    url = f"file://{tmp_path}/a.png"
    assert server.client.post("/v1/chat/completions", json=with_image(url)).status_code == 200
    assert_envelope(server.client.post("/v1/chat/completions", json=with_image("file:///etc/passwd")), 400)


def test_J1_keys_none_wrong_right_and_the_second_of_a_file(start, tmp_path):
    path = tmp_path / "keys"
    path.write_text("# people\nfirst\nsecond\n")
    server = start(api_key_file=str(path))
    assert_envelope(server.ask(), 401)
    send = lambda **h: server.client.post(  # noqa: E731
        "/v1/chat/completions", json={"messages": OK}, headers=h
    )
    assert_envelope(send(Authorization="Bearer third"), 401)
    assert_envelope(send(Authorization="Basic first"), 401)
    assert send(Authorization="Bearer first").status_code == 200
    assert send(**{"X-Api-Key": "second"}).status_code == 200
    assert server.client.get("/health").status_code == 200
    assert_envelope(server.client.get("/v1/models"), 401)


def test_J4_foreign_names_and_origins_are_refused_and_cors_is_closed(server):
    send = lambda **h: server.client.post(  # noqa: E731
        "/v1/chat/completions", json={"messages": OK}, headers=h
    )
    assert_envelope(send(Host="evil.example"), 403)
    assert_envelope(send(Origin="http://evil.example"), 403)
    own = send(Origin=server.url)
    assert own.status_code == 200 and "access-control-allow-origin" not in own.headers


def test_J4_an_origin_that_was_allowed_gets_its_headers(start):
    server = start(cors_origin=("http://friend.example",))
    got = server.client.get("/v1/models", headers={"Origin": "http://friend.example"})
    assert got.headers["access-control-allow-origin"] == "http://friend.example"


def test_J6_a_request_id_cannot_forge_headers_or_log_lines(server):
    ok = server.client.get("/health", headers={"X-Request-Id": "mine-1"})
    assert ok.headers["x-request-id"] == "mine-1"
    odd = server.client.get("/health", headers={"X-Request-Id": "a b{}\\n"})
    assert odd.headers["x-request-id"] != "a b{}\\n"
    assert server.ask(request_id="x\r\nSet-Cookie: y").json()["id"].startswith("chatcmpl-")


def test_J7_log_lines_are_json_and_cannot_be_forged(capsys):
    import logging

    from duomo.serve.logs import JsonLines

    record = logging.LogRecord("duomo.access", 20, "", 0, "two\nlines", None, None)
    record.status = 200
    line = JsonLines().format(record)
    assert (
        "\n" not in line and json.loads(line)["message"] == "two\nlines" and json.loads(line)["status"] == 200
    )


def test_J5_no_prompt_is_logged_unless_asked(start, caplog):
    caplog.set_level("DEBUG")
    start().ask("a very secret question")
    assert "secret" not in caplog.text and "secret" not in str([vars(r) for r in caplog.records])
    start(log_prompts=True).ask("a very secret question")
    assert "secret" in str([vars(r) for r in caplog.records])
