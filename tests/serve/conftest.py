"""A running server over a scripted backend: real sockets, real HTTP, no weights."""

import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

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
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.http.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port = self.http.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=20)

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self.http.serve()

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


def sample(server, name, **labels):
    """The sum of a metric's series that have these labels."""
    total = 0.0
    for line in server.client.get("/metrics").text.splitlines():
        head = line.split("{")[0].split(" ")[0]
        if head == name and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


class Process:
    """`python -m duomo.serve` as a person starts it; with the scripted engine unless a `--model` is given."""

    def __init__(self, *flags, port=None):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        engine = [] if "--model" in flags else ["--engine", "scripted"]
        self.port = port or free_port()
        command = [sys.executable, "-m", "duomo.serve", *engine, *map(str, flags), "--port", str(self.port)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.run = subprocess.Popen(command, env=env, stderr=self.log)
        self.url = f"http://127.0.0.1:{self.port}"
        self.until_ready()

    def until_ready(self, seconds=120):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.run.poll() is None, self.said()
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError("the server did not become ready: " + self.said())

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def ask(self, **fields):
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=30)

    def stream(self, **fields):
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        return httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=30)

    def children(self):
        """Process ids of all descendants, with their command lines."""
        found, waiting = {}, [self.run.pid]
        while waiting:
            for task in Path(f"/proc/{waiting.pop()}/task").glob("*"):
                for child in (task / "children").read_text().split():
                    found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                    waiting.append(int(child))
        return found

    def end(self):
        if self.run.poll() is None:
            self.run.kill()
            self.run.wait(10)
        self.log.close()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_running(pid):
    """False for processes that are gone, and for those that ended and wait for their parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- a real model: tiny random weights, whose words are noise but always the same noise ----

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint: random weights, and a vocabulary trained on a few words."""
    from duomo.checkpoints.save import save_model
    from duomo.model import SpecialIds
    from duomo.processing.tokenizer import Tokenizer
    from duomo.train.vocabulary import train_vocabulary
    from tests.tiny import TINY, tiny_model

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


@pytest.fixture(scope="session")
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
    asyncio.run(running.backend.close())


def see(url, text="What is it?", **fields):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], **GREEDY, **fields}


def answer(real, body):
    got = real.client.post("/v1/chat/completions", json=body)
    assert got.status_code == 200, got.text
    return got.json()
