"""Behaviours A (lifecycle), B (cancellation), F (overload), G (slow clients) and K (metrics)."""

import math
import re
import signal
import socket
import threading
import time

import httpx
import pytest

from duomo.serve.app import create_app
from duomo.serve.scripted import Scripted
from tests.serve.conftest import Process, sample


def test_A1_health_says_loading_then_ready_then_draining_then_failed(start):
    server = start()
    state = server.server
    for name, status in (("loading", 503), ("draining", 503), ("ready", 200)):
        state.state = name
        got = server.client.get("/health")
        assert (got.status_code, got.json()) == (status, {"status": name})
        if name != "ready":
            refused = server.ask()
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == name
    server.backend.die()
    assert server.client.get("/health").status_code == 500
    assert server.ask().status_code == 503
    assert server.client.get("/ping").status_code == 200


def test_A1_an_application_without_a_backend_is_loading():
    assert create_app().state.server.state == "loading"


def test_A2_sigterm_drains_what_runs():
    process = Process("--seed", "1", "--enable-mm", "--reasoning-parser", "ernie-45-vl")
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        process.run.send_signal(signal.SIGTERM)
        assert list(lines)[-2] == "data: [DONE]"
    assert process.run.wait(10) == 0
    said = process.said()
    assert "Traceback" not in said and "--enable-mm was given" in said
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{process.url}/health")


def test_A3_what_does_not_finish_in_time_ends_with_an_error():
    process = Process("--shutdown-timeout-s", "0.3", "--scripted-delay-s", "0.2")
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        process.run.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        health = httpx.get(f"{process.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        rest = [line for line in lines if line]
    assert '"code":"aborted"' in rest[-2] and rest[-1] == "data: [DONE]"
    assert process.run.wait(10) == 0
    process.end()


def test_A5_a_second_sigterm_stops_at_once():
    process = Process("--scripted-delay-s", "0.5")
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        process.run.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.run.poll() is None
        process.run.send_signal(signal.SIGTERM)
        assert process.run.wait(4) == 0
    process.end()


def test_A8_the_death_of_the_engine_ends_every_stream_with_an_error(start):
    server = start(Scripted(answer="word " * 3000, delay_s=0.005))
    ends = []

    def read():
        ends.append(server.events(enable_thinking=False)[-2:])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert server.until(lambda: sample(server, "vllm:time_to_first_token_seconds_count") == 4)
    server.backend.die()
    dead = time.monotonic()
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - dead < 2
    assert len(ends) == 4
    for error, done in ends:
        assert error["error"]["code"] == "engine_error" and done == "[DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_B1_B2_leaving_frees_everything_at_once(start, stream):
    server = start(Scripted(answer="word " * 3000, delay_s=0.002))
    body = {"messages": [{"role": "user", "content": "x"}], "stream": stream, "enable_thinking": False}
    for _ in range(20):
        request = httpx.Request("POST", f"{server.url}/v1/chat/completions", json=body)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            head = f"Host: 127.0.0.1\r\nContent-Length: {len(request.content)}\r\n"
            head = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Type: application/json\r\n\r\n"
            raw.sendall(head.encode() + request.content)
            if stream:
                raw.recv(10)
            else:
                assert server.until(lambda: server.backend.gauges()["running"] > 0)
        assert server.until(lambda: server.backend.gauges()["running"] == 0, 2)
    assert server.until(lambda: server.backend.gauges()["running"] == 0 and server.server.gate.inside == 0, 2)
    assert sample(server, "vllm:num_requests_running") == 0
    assert sample(server, "duomo:requests_cancelled_total") == 20


def test_B7_cancel_by_id_ends_the_request_and_not_its_neighbour(start):
    server = start(Scripted(answer="word " * 200, delay_s=0.005))
    out = {}

    def ask(name):
        out[name] = server.ask(request_id=f"chatcmpl-{name}", enable_thinking=False).json()

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    assert server.until(lambda: server.backend.gauges()["running"] == 2)
    body = {"id": "chatcmpl-a", "action": "cancel"}
    assert server.client.post("/v1/chat/completions/control", json=body).status_code == 200
    for thread in threads:
        thread.join(10)
    assert out["a"]["choices"][0]["finish_reason"] == "abort"
    assert out["b"]["choices"][0]["message"]["content"] == server.backend.answer


def test_F1_over_the_cap_is_429_with_retry_after_and_recovers(start):
    server = start(Scripted(answer="word " * 300, delay_s=0.005), max_concurrency=2)
    threads = [threading.Thread(target=server.ask, kwargs={"enable_thinking": False}) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert server.until(lambda: server.server.gate.inside == 2)
    began = time.monotonic()
    for stream in (True, False):
        refused = server.ask(stream=stream)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    assert time.monotonic() - began < 1
    for thread in threads:
        thread.join(10)
    assert server.ask().status_code == 200


def test_G2_a_silent_stream_gets_comments(start):
    server = start(Scripted(delay_s=0.3, thoughts="", answer="a b"), keep_alive_s=0.1)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "enable_thinking": False}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = list(response.iter_lines())
    assert lines.count(": still working") >= 2 and lines[-2] == "data: [DONE]"


def test_G1_a_reader_that_stands_still_blocks_nobody_and_is_dropped(start):
    server = start(Scripted(answer="x" * 20_000 + " y" * 50, thoughts=""), slow_client_s=0.4)
    server.backend.answer = ("z" * 30_000 + " ") * 600
    body = b'{"messages":[{"role":"user","content":"x"}],"stream":true,"enable_thinking":false}'
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    assert server.until(lambda: server.server.gate.inside == 1)
    assert server.client.get("/health").status_code == 200
    assert server.until(lambda: server.server.gate.inside == 0, 5)
    raw.close()


def test_K1_K3_K5_K6_metrics_count_what_happened(start):
    server = start()
    before = server.client.get("/metrics").text
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:mm_cache_hits_total",
        "vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
        "vllm:request_success_total", "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds", "duomo:thinking_tokens_total", "duomo:image_tokens_total",
    ):  # fmt: skip
        assert f"# TYPE {name.removesuffix('_total')}" in before or f"# TYPE {name}" in before, name
    total = {"prompt_tokens": 0, "completion_tokens": 0}
    for index in range(5):
        usage = server.ask(enable_thinking=bool(index % 2)).json()["usage"]
        total = {key: total[key] + usage[key] for key in total}
    server.ask(temperature=-1)
    assert sample(server, "vllm:request_success_total", finished_reason="stop") == 5
    assert sample(server, "vllm:prompt_tokens_total") == total["prompt_tokens"]
    assert sample(server, "vllm:generation_tokens_total") == total["completion_tokens"]
    assert sample(server, "vllm:num_requests_running") == 0
    assert sample(server, "duomo:errors_total", code="invalid_value") == 1
    after = server.client.get("/metrics").text
    values = [float(line.rsplit(" ", 1)[1]) for line in after.splitlines() if not line.startswith("#")]
    assert all(math.isfinite(value) for value in values)
    names = set(re.findall(r'(\w+)="', after))
    assert names <= {"model_name", "finished_reason", "code", "endpoint", "status", "le"}
