"""Behaviours A with real processes: a tiny model on disk, its engine and its decoders beside the server."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.serve.conftest import GREEDY, Process, is_running, picture_url, see

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
LONG = {"max_tokens": 2000, "ignore_eos": True, "enable_thinking": False}


@pytest.fixture
def begin(folder):
    begun = []

    def start(*flags, **more):
        begun.append(Process("--model", folder, "--kv-mb", "64", *flags, **more))
        return begun[-1]

    yield start
    for process in begun:
        process.end()


def engine_of(process):
    return next(pid for pid, command in process.children().items() if "duomo.engine.process" in command)


def read_streams(process, number):
    """Begins streams; returns once each has spoken, with what each will have said and when it ended."""
    ends, spoken = [], threading.Semaphore(0)

    def read():
        with process.stream(**LONG) as response:
            lines = []
            for line in response.iter_lines():
                if line and len(lines) == 1:
                    spoken.release()
                lines += [line] if line else []
        ends.append((time.monotonic(), lines))

    threads = [threading.Thread(target=read) for _ in range(number)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert spoken.acquire(timeout=60)
    return threads, ends


def joined(threads):
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def test_A2_while_draining_new_requests_are_refused_and_running_ones_finish():
    process = Process("--scripted-delay-s", "0.1")
    with process.stream(enable_thinking=False) as running:
        lines = running.iter_lines()
        next(lines)
        process.run.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = process.ask()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"]
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"stop"' in rest[-2]
    assert process.run.wait(10) == 0
    process.end()


def test_A3_with_no_time_to_drain_it_is_gone_within_four_seconds():
    process = Process("--scripted-delay-s", "0.3", "--shutdown-timeout-s", "0")
    with process.stream() as running:
        lines = running.iter_lines()  # kept: httpx ends the request with its iterator
        next(lines)
        began = time.monotonic()
        process.run.send_signal(signal.SIGTERM)
        assert process.run.wait(4) == 0 and time.monotonic() - began < 4
    process.end()


def test_A4_no_child_process_is_left_after_sigterm(begin):
    process = begin()
    with httpx.Client(base_url=process.url, timeout=30) as client:
        asked = client.post("/v1/chat/completions", json=see(picture_url(width=60, height=60)))
        assert asked.status_code == 200, asked.text
    children = process.children()
    commands = " ".join(children.values())
    assert "duomo.engine.process" in commands and "duomo.processing.decode_worker" in commands
    process.run.send_signal(signal.SIGTERM)
    assert process.run.wait(20) == 0
    assert not any(is_running(pid) for pid in children)
    assert "Traceback" not in process.said()


def test_A6_A7_after_kill_9_nothing_is_left_and_the_same_command_works_again(begin, tmp_path):
    flags = ("--encoder-cache-dir", tmp_path)
    process = begin(*flags)
    body = see(picture_url(width=60, height=60), return_token_ids=True)
    first = httpx.post(f"{process.url}/v1/chat/completions", json=body, timeout=30).json()
    children = process.children()
    places = [word for command in children.values() for word in command.split() if "/duomo-" in word]
    process.run.kill()
    process.run.wait(10)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in children)
    assert places and not any(os.path.exists(place) for place in places)
    again = begin(*flags, port=process.port)
    second = httpx.post(f"{again.url}/v1/chat/completions", json=body, timeout=30).json()
    assert second["choices"] == first["choices"]


def test_A9_kill_9_of_the_engine_ends_streams_within_2_s_and_the_server_recovers(begin):
    process = begin("--on-engine-death", "restart")
    threads, ends = read_streams(process, 4)
    engine = engine_of(process)
    killed = time.monotonic()
    os.kill(engine, signal.SIGKILL)
    joined(threads)
    for ended, lines in ends:
        assert ended - killed < 2
        assert '"code":"engine_error"' in lines[-2] and lines[-1] == "data: [DONE]"
    seen = httpx.get(f"{process.url}/health")
    assert seen.status_code in (500, 503) and seen.json()["status"] in ("failed", "loading")
    assert process.ask().status_code == 503
    process.until_ready()
    assert process.ask(**GREEDY).status_code == 200 and engine_of(process) != engine


def test_A9_kill_9_of_the_engine_ends_the_server_where_that_was_asked(begin):
    process = begin("--on-engine-death", "exit")
    threads, ends = read_streams(process, 2)
    os.kill(engine_of(process), signal.SIGKILL)
    joined(threads)
    assert all('"code":"engine_error"' in lines[-2] for _, lines in ends) and len(ends) == 2
    assert process.run.wait(10) == 1
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", process.port), timeout=1)


def test_A9_a_model_that_cannot_be_opened_is_one_line_and_an_exit_code(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssertionError) as ended:
        Process("--model", tmp_path)
    said = str(ended.value)
    assert "Traceback" not in said and "duomo: " in said


def test_A9_a_port_that_is_taken_is_one_line_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = subprocess.run(
            [sys.executable, "-m", "duomo.serve", "--engine", "scripted", "--port", str(port)],
            capture_output=True, text=True, timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr.strip() == (
        f"duomo: --host 127.0.0.1 --port {port} cannot be listened on: address already in use"
    )


def test_A9_bind_holds_a_free_port_on_every_address_and_names_a_host_that_is_none():
    from duomo.errors import ConfigError
    from duomo.serve.http import bind

    sockets = bind("localhost", 0)
    ports = {one.getsockname()[1] for one in sockets}
    assert len(ports) == 1 and 0 not in ports
    with pytest.raises(ConfigError, match="cannot be listened on"):
        bind("127.0.0.1", ports.pop())
    for one in sockets:
        one.close()
    with pytest.raises(ConfigError, match="300"):
        bind("300.1.2.3", 1)
