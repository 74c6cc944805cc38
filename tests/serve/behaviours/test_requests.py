"""Behaviours D and J: what people send by mistake or on purpose, one test for each line of the list."""

import hmac
import json

import pytest

from duomo.serve import limits
from tests.serve.conftest import answer, picture_url, see
from tests.serve.test_bad_input import OK, assert_envelope

CHAT = "/v1/chat/completions"


def send(server, path=CHAT, **fields):
    return server.client.post(path, json={"messages": OK, **fields})


def raw(server, body, path=CHAT):
    return server.client.post(path, content=body, headers={"Content-Type": "application/json"})


def test_D1_D2_what_is_no_json_object(server):
    for body in (b"", b"not json", b"[1]", b"null", b'"text"', b"{", b'{"a":1}{"b":2}'):
        for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/decisions", "/tokenize"):
            assert assert_envelope(raw(server, body, path), 400)["code"] == "invalid_json"


@pytest.mark.parametrize(
    "field, value",
    [
        ("messages", "hi"), ("messages", {}), ("temperature", "1"), ("stream", 1), ("n", 1.5), ("stop", 5),
        ("logit_bias", []), ("tools", {}), ("max_tokens", "5"), ("seed", "x"), ("top_logprobs", True),
        ("stream_options", True), ("model", 7), ("response_format", "json"), ("thinking", []),
    ],
)  # fmt: skip
def test_D3_a_field_of_another_type_is_named(server, field, value):
    error = assert_envelope(send(server, **{field: value}), 400)
    assert error["param"] == field or error["message"].startswith(field)


def test_D4_D5_roles_and_messages(server):
    assert assert_envelope(send(server, messages=[{"role": "wizard", "content": "x"}]), 400)["param"]
    for messages in ([], [{"role": "user"}], [{}], [{"content": "x"}]):
        assert_envelope(send(server, messages=messages), 400)


def test_D6_a_schema_that_is_not_there(server):
    for form in ({"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}, {"type": "yaml"}, {}):
        assert_envelope(send(server, response_format=form), 400)


def test_D7_D8_grammars_that_are_none_or_never_end(real):
    deep = {"type": "object"}
    for _ in range(150):
        deep = {"type": "object", "properties": {"a": deep}}
    text = '{"type":"array","items":' * 10_000 + "{}" + "}" * 10_000
    loop = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    for wrong in (
        {"guided_regex": "("}, {"guided_regex": "(a{1000}){1000}"}, {"guided_grammar": "start: ???"},
        {"guided_json": {"type": "nonsense"}}, {"guided_json": text}, {"guided_json": deep},
        {"guided_json": loop}, {"guided_json": {"$ref": "https://example.org/schema"}},
    ):  # fmt: skip
        got = send(real, max_tokens=4, **wrong)
        assert got.status_code in (200, 400), got.text  # what can be compiled may be asked for
        if got.status_code == 400:
            assert_envelope(got, 400)
    recursive = {
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"
    }  # fmt: skip
    assert send(real, max_tokens=4, guided_json=recursive).status_code == 200
    assert send(real, max_tokens=4).status_code == 200


def test_D9_a_bias_out_of_the_vocabulary(real):
    for bias in ({"99999999": 1}, {"-1": 1}, {"cat": 1}, {"1": 1000}):
        assert_envelope(send(real, logit_bias=bias), 400)


def test_D10_D11_D13_numbers_and_lists_out_of_bounds(server):
    for fields in (
        {"stop": ["x"] * 17}, {"stop": [""]}, {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 10**30},
        {"n": 0}, {"n": 17}, {"n": 10**9}, {"top_logprobs": 21, "logprobs": True}, {"seed": 1 << 70},
    ):  # fmt: skip
        assert_envelope(send(server, **fields), 400)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '"NaN"'])
def test_D12_a_temperature_that_is_no_number(server, text):
    body = f'{{"messages":[{{"role":"user","content":"x"}}],"temperature":{text}}}'
    assert_envelope(raw(server, body.encode()), 400)


def test_D14_a_model_that_is_not_served(start):
    server = start(served_model_name=("ernie",))
    bodies = {
        CHAT: {"messages": OK}, "/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": OK, "max_tokens": 5}, "/v1/messages/count_tokens": {"messages": OK},
        CHAT + "/input_tokens": {"messages": OK},
        "/v1/decisions": {"input": "x", "questions": [{"type": "predicate", "instructions": "y"}]},
    }  # fmt: skip
    for path, body in bodies.items():
        wrong = server.client.post(path, json={**body, "model": "gpt"})
        assert assert_envelope(wrong, 404)["code"] == "model_not_found"
        assert server.client.post(path, json={**body, "model": "ernie"}).status_code == 200


def test_D15_tools_that_are_none(server):
    function = {"name": "f"}
    for tools in (
        [{}], [{"type": "function"}], [{"type": "function", "function": {}}], ["f"], [{"type": "retrieval"}],
        [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {"name": "f", "parameters": "none"}}],
        [{"type": "function", "function": function}] * 2,
    ):  # fmt: skip
        assert_envelope(send(server, tools=tools), 400)


def test_D16_D17_bytes_that_are_no_text_and_zeros_that_are(server):
    for body in (b"\xff\xfe{}", b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}'):
        assert_envelope(raw(server, body), 400)
    assert_envelope(raw(server, b'{"messages":[{"role":"user","content":"\\ud800"}]}'), 400)
    assert send(server, messages=[{"role": "user", "content": "a\0b"}]).status_code == 200


def test_D18_fifty_megabytes_of_text_are_refused_in_words(start):
    server = start(max_body_mb=64)
    long = send(server, messages=[{"role": "user", "content": "word " * 10_000_000}])
    assert assert_envelope(long, 400)["code"] == "context_length_exceeded"
    assert send(server).status_code == 200


def test_D20_a_picture_in_the_system_message_is_refused(real):
    part = {"type": "image_url", "image_url": {"url": picture_url(width=60, height=60)}}
    body = see(picture_url(width=60, height=60))
    body["messages"].insert(0, {"role": "system", "content": [part]})
    assert assert_envelope(real.client.post(CHAT, json=body), 400)["code"] == "invalid_prompt"
    del body["messages"][0]
    assert answer(real, body)["usage"]["prompt_tokens_details"]["image_tokens"] > 0


# ---- J ----


def test_J2_keys_are_compared_in_constant_time_all_of_them(start, monkeypatch):
    server = start(api_key=("first", "second", "third"))
    compared = []

    def counting(one, other):
        compared.append(len(one) == len(other) == 32)
        return compare(one, other)

    compare = hmac.compare_digest
    monkeypatch.setattr(limits.hmac, "compare_digest", counting)
    for key in ("first", "third", "wrong", "x" * 5000, "é"):
        compared.clear()
        server.client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert compared == [True] * 3, key


def test_J3_metrics_are_open_or_need_a_key_as_configured(start):
    with_key = {"Authorization": "Bearer k"}
    usual = start(api_key=("k",))
    assert usual.client.get("/metrics").status_code == 200
    assert_envelope(usual.client.get("/load"), 401)
    guarded = start(api_key=("k",), metrics_need_key=True)
    assert_envelope(guarded.client.get("/metrics"), 401)
    assert guarded.client.get("/metrics", headers=with_key).status_code == 200
    assert guarded.client.get("/health").status_code == 200


def test_J4_no_origin_gets_in_by_itself_and_preflights_are_refused(server):
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = server.client.options(CHAT, headers=asked)
    assert preflight.status_code >= 400 and "access-control-allow-origin" not in preflight.headers


def test_J5_keys_pictures_and_prompts_stay_out_of_the_log(start, caplog):
    caplog.set_level("DEBUG")
    server = start(api_key=("very-secret-key",))
    server.client.headers["Authorization"] = "Bearer very-secret-key"
    body = see(picture_url(), text="a secret question")
    assert server.client.post(CHAT, json=body).status_code == 200
    server.client.post(CHAT, json={**body, "temperature": -1})
    everything = caplog.text + str([vars(record) for record in caplog.records])
    assert "secret" not in everything and picture_url()[-40:] not in everything


def test_J6_J7_ids_and_fields_of_a_client_forge_neither_headers_nor_lines(server, caplog):
    caplog.set_level("DEBUG")
    for forged in ("a\tb", "x" * 65, 'a"b', "ü".encode(), "a/b", "${jndi:x}"):
        got = server.client.get("/version", headers={"X-Request-Id": forged})
        assert got.headers["x-request-id"] != forged and got.headers["x-request-id"].isalnum()
    from duomo.serve.logs import JsonLines

    raw(server, json.dumps({"messages": OK, "a\r\nX-Forged: 1": 1, "b": 2}).encode())
    for record in caplog.records:
        assert "\n" not in JsonLines().format(record)
