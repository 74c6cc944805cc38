"""A running server over a scripted backend: real sockets, real HTTP, no weights."""

import asyncio
import base64
import io
import json
import threading
import time
from dataclasses import replace

import httpx
import pytest
import uvicorn

from duomo.serve.app import create_app
from duomo.serve.http import http_config
from duomo.serve.options import Options
from duomo.serve.scripted import Scripted


class Running:
    """A server in a thread; `client` speaks to it, `backend` is what answers."""

    def __init__(self, backend, options):
        self.backend, self.app = backend, create_app(backend, options)
        self.server = self.app.state.server
        config = http_config(self.app, replace(options, port=0))
        self.http = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.http.serve()), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.http.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port = self.http.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def stop(self):
        self.client.close()
        self.http.should_exit = True
        self.thread.join(10)

    def ask(self, text="Hello?", **fields):
        body = {"messages": [{"role": "user", "content": text}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def events(self, text="Hello?", path="/v1/chat/completions", **fields):
        body = {"messages": [{"role": "user", "content": text}], "stream": True, **fields}
        with self.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            return parse_events(response.iter_lines())

    def until(self, check, seconds=5.0):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if check():
                return True
            time.sleep(0.01)
        return False


def parse_events(lines):
    return [
        line[6:] if line[6:] == "[DONE]" else json.loads(line[6:])
        for line in lines
        if line.startswith("data: ")
    ]


@pytest.fixture
def start():
    """`start(backend=None, **options)` runs a server for one test."""
    running = []

    def begin(backend=None, **options):
        running.append(Running(backend or Scripted(), Options(**options)))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def server():
    running = Running(Scripted(), Options())
    yield running
    running.stop()


def picture(width=32, height=24, colour="red", kind="PNG", mode="RGB"):
    from PIL import Image

    out = io.BytesIO()
    Image.new(mode, (width, height), colour).save(out, kind)
    return out.getvalue()


def picture_url(**kwargs):
    return "data:image/png;base64," + base64.b64encode(picture(**kwargs)).decode()
