"""Behaviours B, F, G and K of connections, queues and counters, on a server that speaks fixed text."""

import contextlib
import os
import re
import socket
import sys
import threading
import time

import httpx
import pytest

from duomo.serve.scripted import Scripted
from tests.serve.conftest import sample

BODY = b'{"messages":[{"role":"user","content":"x"}],"stream":true,"enable_thinking":false}'


def head(server, body=BODY, *more):
    lines = [
        "POST /v1/chat/completions HTTP/1.1", f"Host: 127.0.0.1:{server.port}",
        "Content-Type: application/json", f"Content-Length: {len(body)}", *more,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def everything(raw):
    pieces = []
    while piece := raw.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts open files in /proc")
def test_B6_a_hundred_who_connect_and_leave_cost_nothing(start):
    server = start(Scripted(answer="word " * 500, delay_s=0.002))
    server.ask()
    files = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    before, threads = files(), threading.active_count()
    for index in range(100):
        with connect(server) as raw:
            if index % 3:
                raw.sendall(head(server)[: None if index % 3 == 1 else 60])
            if index % 3 == 1:
                raw.sendall(BODY)
                raw.recv(20)
    assert server.until(lambda: server.server.gate.inside == 0 and files() <= before)
    assert server.backend.gauges()["running"] == 0 and threading.active_count() <= threads + 2
    assert server.ask().status_code == 200


def test_F1_each_of_many_over_the_cap_is_told_at_once_when_to_come_back(start):
    server = start(Scripted(answer="word " * 400, delay_s=0.005), max_concurrency=1)
    with server.client.stream("POST", "/v1/chat/completions", content=BODY, headers=JSON) as running:
        lines = running.iter_lines()
        next(lines)
        bodies = {
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
            "/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x"},
            "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
            "/v1/decisions": {"input": "x", "questions": [{"type": "predicate", "instructions": "y"}]},
        }  # fmt: skip
        for path, body in bodies.items():
            refused = server.client.post(path, json=body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1, path
        assert server.client.get("/health").status_code == 200
    assert server.until(lambda: server.server.gate.inside == 0)
    assert server.ask().status_code == 200


JSON = {"Content-Type": "application/json"}


def test_G3_half_a_request_is_dropped_in_time_and_a_whole_one_is_not(start):
    server = start(Scripted(delay_s=0.03), request_timeout_s=0.3)
    halves = [b"", b"POST /v1/chat", head(server), head(server) + BODY[:20]]
    waiting = [connect(server) for _ in halves]
    for raw, half in zip(waiting, halves, strict=True):
        raw.sendall(half)
    began = time.monotonic()
    for raw in waiting:
        everything(raw)  # until the server closes it
        raw.close()
    assert time.monotonic() - began < 5
    assert server.ask().status_code == 200  # takes longer than the time to arrive, and may
    assert server.server.gate.inside == 0


def test_G4_pipelined_requests_are_answered_in_order(server):
    get = f"GET /version HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
    with connect(server) as raw:
        raw.sendall((get + "X-Request-Id: one\r\n\r\n" + get + "X-Request-Id: two\r\n").encode())
        raw.sendall(b"Connection: close\r\n\r\n")
        said = everything(raw).decode()
    assert said.count("HTTP/1.1 200") == 2 and said.index("x-request-id: one") < said.index("two")


def test_G5_connection_close_is_kept_to(server):
    with connect(server) as raw:
        raw.sendall(head(server, BODY, "Connection: close") + BODY)
        said = everything(raw)
    assert b"connection: close" in said.lower() and b"data: [DONE]" in said


def test_G6_two_hundred_idle_streams_leave_room_for_others(start):
    server = start(Scripted(answer="a b", delay_s=3.0), keep_alive_s=0.5, max_concurrency=400)
    streams = [connect(server) for _ in range(200)]
    for raw in streams:
        raw.sendall(head(server, BODY, "Connection: close") + BODY)
    assert server.until(lambda: server.server.gate.inside == 200, 20)
    began = time.monotonic()
    for _ in range(5):
        assert server.client.get("/health").status_code == 200
        assert server.client.post("/tokenize", json={"prompt": "x"}).status_code == 200
    assert time.monotonic() - began < 5
    for raw in streams:
        raw.settimeout(30)
        said = everything(raw)
        raw.close()
        assert b": still working" in said and b"data: [DONE]" in said
    assert server.until(lambda: server.server.gate.inside == 0)


def test_G_what_is_no_http_gets_an_envelope(server):
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        with connect(server) as raw:
            raw.sendall(nonsense)
            said = everything(raw)
        assert said.startswith(b"HTTP/1.1 400") and b'"code":"invalid_http"' in said
    # A head without an end is cut off, and told so where that can still be heard.
    with connect(server) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 200_000)
        raw.sendall(b"\r\n\r\n")
        assert everything(raw).startswith(b"HTTP/1.1 400")
    assert server.client.get("/version").status_code == 200


@pytest.mark.parametrize("piece", [700, 200_000])
def test_G_a_head_that_goes_on_is_cut_off(server, piece):
    """In one line or in many, in one packet or in several, before it has an end."""
    for lines in (b"X-Long: " + b"x" * 400_000, b"X-Short: xxxx\r\n" * 30_000):
        with connect(server) as raw, contextlib.suppress(ConnectionError):
            sent = b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + lines
            for start_of in range(0, len(sent), piece):
                raw.sendall(sent[start_of : start_of + piece])
            raw.settimeout(5)  # no end was sent: only a server that gives up answers
            assert everything(raw).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("pause", [False, True])
def test_G_an_offer_of_another_protocol_is_not_taken_up(server, pause):
    """As Java's client and `curl --http2` make it: the body is read, and the connection goes on."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
    with connect(server) as raw:
        raw.sendall(head(server, BODY, *offer) + BODY[: 30 if pause else None])
        if pause:
            time.sleep(0.1)
            raw.sendall(BODY[30:])
        said = b""
        while b"data: [DONE]" not in said:
            said += raw.recv(65536)
        raw.sendall(head(server, BODY, "Connection: close") + BODY)
        then = everything(raw)
    assert said.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 200" in then and b"data: [DONE]" in then
    with connect(server) as raw:
        raw.sendall(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n")
        assert everything(raw).startswith(b"HTTP/1.1 400")


def test_G_a_body_in_chunks_is_read_and_two_lengths_are_refused(server):
    start = head(server, BODY, "Connection: close")
    chunked = start.replace(b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked")
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:9], BODY[9:])) + b"0\r\n\r\n"
    both = start.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
    twice = start.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n")
    for sent, status in ((chunked + body, b"200"), (both + body, b"400"), (twice + BODY, b"400")):
        with connect(server) as raw:
            raw.sendall(sent)
            assert everything(raw).startswith(b"HTTP/1.1 " + status)


def test_G_a_client_that_leaves_while_sending_is_no_failure_of_ours(start, caplog):
    server = start()
    with connect(server) as raw:
        raw.sendall(head(server) + BODY[:10])
    assert server.until(lambda: sample(server, "duomo:http_requests_total", status="499") == 1)
    assert "unforeseen" not in caplog.text


def counters(server):
    found = {}
    for line in server.client.get("/metrics").text.splitlines():
        name = re.match(r"[\w:]+", line)
        if name and (name[0].endswith(("_total", "_count", "_sum", "_bucket"))):
            found[line.rsplit(" ", 1)[0]] = float(line.rsplit(" ", 1)[1])
    return found


def test_K2_counters_never_fall(start):
    server, last = start(), {}
    for index in range(6):
        server.ask(enable_thinking=bool(index % 2), temperature=1 if index % 3 else -1)
        now = counters(server)
        assert all(now[name] >= value for name, value in last.items())
        last = now
    assert last


def test_K4_gauges_rise_and_return_to_nothing(start):
    server = start(Scripted(answer="word " * 300, delay_s=0.005))
    thread = threading.Thread(target=server.ask, kwargs={"enable_thinking": False})
    thread.start()
    assert server.until(lambda: sample(server, "vllm:num_requests_running") == 1)
    thread.join(20)
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert sample(server, name) == 0
    assert sample(server, "vllm:request_success_total") == sample(
        server, "vllm:e2e_request_latency_seconds_count"
    )


def test_K6_nothing_that_a_client_writes_becomes_a_label(start):
    server = start()
    before = {re.sub(r" .*", "", line) for line in counters(server)}
    for index in range(5):
        server.ask(model=f"model-{index}", user=f"user-{index}", request_id=f"id-{index}")
        server.client.get(f"/v1/models/name-{index}")
        httpx.get(f"{server.url}/nowhere/{index}")
    text = server.client.get("/metrics").text
    assert before and not re.search(r"(model|user|id|name|nowhere)[-/]\d", text)
