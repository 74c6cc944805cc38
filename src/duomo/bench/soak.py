"""`python -m duomo.bench.soak --minutes 10`: many clients of every temper against one server on loopback.

Text and pictures, whole and streamed, cancelled half-way, read slowly, and wrong in a dozen ways. Nothing may
be a 5xx or go unanswered, and when everybody has left, pages, sockets, processes and memory must be back
where they were after a first half minute of the same. Bounded in time; the server is started and ended here.

Memory is private memory, of each kind of process, less what the bounded caches say they hold (pages of keys
and values that were ever written, features of pictures, decoded pictures): those are told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from duomo.bench.overhead import free_port, wait_for

_CHAT = "/v1/chat/completions"
_ANSWER_S = 300.0  # an answer that takes longer counts as none
_GROWTH, _SLACK_MIB = (
    1.1,
    8.0,
)  # of each kind of process, from after the warm-up to the end: the larger counts
_WARM_S, _SETTLE_S = 30.0, 8.0
_KINDS = {
    "duomo.serve": "server",
    "duomo.engine.process": "engine",
    "duomo.processing.decode_worker": "decoders",
}


class State(NamedTuple):
    """Of the server and its children. `pages_held` by requests; cached pages do not count."""

    pages_held: float
    running: float
    sockets: int
    processes: int
    memory_mib: dict[str, float]  # private, by kind of process
    caches_mib: dict[str, float]  # the part of it that caches with a bound say they hold

    @property
    def own_mib(self) -> dict[str, float]:
        return {kind: size - self.caches_mib.get(kind, 0.0) for kind, size in self.memory_mib.items()}


class Soak:
    def __init__(self, url: str, seed: int) -> None:
        self.url, self.random = url, random.Random(seed)
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.client = httpx.AsyncClient(
            base_url=url, timeout=_ANSWER_S, limits=httpx.Limits(max_connections=64)
        )

    async def one(self) -> None:
        kinds = [self.whole, self.streamed, self.picture, self.left, self.slow, self.bad, self.counted]
        kind: Callable[[], Awaitable[None]] = self.random.choice(kinds)
        await self.do(kind)

    async def do(self, kind: Callable[[], Awaitable[None]]) -> None:
        name = kind.__name__
        try:
            await kind()
            self.outcomes[name] += 1
        except Exception as error:
            self.failures.append(f"{name}: {type(error).__name__} {error}"[:300])

    def ask(self, **fields: Any) -> dict[str, Any]:
        text = self.random.choice(
            ["What is 3 + 4?", "Hello!", "你好，你是谁？", "Tell me of red circles. " * 9]
        )
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 24, **fields}

    async def whole(self) -> None:
        answer = await self.client.post(_CHAT, json=self.ask(thinking=self.random.choice(["on", "off"])))
        _expect(answer.status_code == 200, answer)
        _expect(answer.json()["choices"][0]["finish_reason"] in ("stop", "length"), answer)

    async def streamed(self) -> None:
        async with self.client.stream("POST", _CHAT, json=self.ask(stream=True)) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert answer.status_code == 200 and lines[-1] == "data: [DONE]", lines[-1:]
        assert not any('"error"' in line[:20] for line in lines), lines[-2:]

    async def picture(self) -> None:
        part = {"type": "image_url", "image_url": {"url": _picture(self.random)}}
        content = [part, {"type": "text", "text": "What do you see?"}]
        body = self.ask(max_tokens=8, messages=[{"role": "user", "content": content}])
        answer = await self.client.post(_CHAT, json=body)
        _expect(answer.status_code == 200, answer)
        _expect(answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0, answer)

    async def left(self) -> None:
        """Closes the stream after a few lines."""
        body = self.ask(stream=True, max_tokens=400, ignore_eos=True)
        async with self.client.stream("POST", _CHAT, json=body) as answer:
            assert answer.status_code == 200
            count = 0
            async for _ in answer.aiter_lines():
                count += 1
                if count > self.random.randint(1, 12):
                    return

    async def slow(self) -> None:
        """Reads a little at a time, with pauses, to the end."""
        async with self.client.stream("POST", _CHAT, json=self.ask(stream=True)) as answer:
            assert answer.status_code == 200
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                await asyncio.sleep(0.05)
        assert last == "data: [DONE]", last

    async def bad(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgoAAAA="}}
        wrongs: list[dict[str, Any]] = [
            {"temperature": -1}, {"n": 0}, {"messages": []}, {"guided_regex": "("},
            {"thinking_budget": 3, "reasoning_max_tokens": 4}, {"logit_bias": {"999999999": 1}},
            {"messages": [{"role": "user", "content": [image]}]},
            {"messages": [{"role": "user", "content": "word " * 40_000}]},
        ]  # fmt: skip
        bodies = [b"{", b"[]", b"\xff", *(json.dumps(self.ask(**wrong)).encode() for wrong in wrongs)]
        body = self.random.choice(bodies)
        answer = await self.client.post(_CHAT, content=body, headers={"Content-Type": "application/json"})
        _expect(400 <= answer.status_code < 500 and answer.json()["error"]["code"], answer)

    async def counted(self) -> None:
        answer = await self.client.post(_CHAT + "/input_tokens", json=self.ask())
        _expect(answer.status_code == 200 and answer.json()["input_tokens"] > 0, answer)

    async def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds

        async def keep_on() -> None:
            while time.monotonic() < end:
                await self.one()

        await asyncio.gather(*(keep_on() for _ in range(clients)))

    async def left_alone(self, pid: int) -> State:
        """The state after a pause; a decoder has worked, which a wrong picture would have ended."""
        await self.do(self.picture)
        await asyncio.sleep(_SETTLE_S)
        return await self.state(pid)

    async def state(self, pid: int) -> State:
        load = (await self.client.get("/load")).json()
        family = _family(pid)
        memory_mib: dict[str, float] = {}
        for one in family:
            kind = _kind(one)
            memory_mib[kind] = round(memory_mib.get(kind, 0.0) + _memory_mib(one), 1)
        written = load["kv_bytes"] * load["pages_written"] / load["pages"]
        caches_bytes = {"server": load["media_kept_bytes"], "engine": load["feature_bytes"] + written}
        return State(
            load["pages_held"], load["running"] + load["server_load"],
            sum(_num_sockets(one) for one in family), len(family), memory_mib,
            {kind: round(size / (1 << 20), 1) for kind, size in caches_bytes.items()},
        )  # fmt: skip


def _expect(holds: object, answer: httpx.Response) -> None:
    assert holds, f"{answer.status_code} {answer.text[:200]}"


def _picture(chance: random.Random) -> str:
    from PIL import Image

    size = chance.choice([(56, 56), (84, 56), (140, 112)])
    colour = tuple(chance.randrange(256) for _ in range(3))
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, chance.choice(["PNG", "JPEG", "WEBP"]))
    mime = {b"\x89": "png", b"\xff": "jpeg", b"R": "webp"}[out.getvalue()[:1]]
    return f"data:image/{mime};base64," + base64.b64encode(out.getvalue()).decode()


def _family(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(one for child in children for one in _family(int(child)))]


def _kind(pid: int) -> str:
    """Which of duomo's processes this is, by the module it runs."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return next((kind for module, kind in _KINDS.items() if module in words), "others")


def _num_sockets(pid: int) -> int:
    folder, count = Path(f"/proc/{pid}/fd"), 0
    for name in os.listdir(folder):
        try:
            count += os.readlink(folder / name).startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    return count


def _memory_mib(pid: int) -> float:
    """Private memory: what would be free if the process ended."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = [int(row.split()[1]) for row in text.splitlines() if row.startswith(("Private_Dirty", "Swap:"))]
    return sum(kib) / 1024


async def soak(url: str, pid: int, clients: int, minutes: float, seed: int) -> dict[str, Any]:
    work = Soak(url, seed)
    await work.run(clients, _WARM_S)
    before = await work.left_alone(pid)
    began = time.monotonic()
    timeline = [(0, before)]

    async def look() -> None:
        while True:
            await asyncio.sleep(5.0)
            timeline.append((round(time.monotonic() - began), await work.state(pid)))

    looking = asyncio.ensure_future(look())
    await work.run(clients, minutes * 60)
    looking.cancel()
    after = await work.left_alone(pid)
    seen = [state for _, state in timeline] + [after]
    metrics = (await work.client.get("/metrics")).text
    await work.client.aclose()
    five = [
        line
        for line in metrics.splitlines()
        if line.startswith("duomo:http_requests_total")
        and 'status="5' in line
        and 'endpoint="/health"' not in line  # 503 until the model was loaded, before anybody asked
    ]
    return {
        "clients": clients, "minutes": round((time.monotonic() - began) / 60, 2),
        "requests": sum(work.outcomes.values()), "by_kind": dict(work.outcomes),
        "failures": work.failures[:20], "num_failures": len(work.failures), "answers_5xx": five,
        "before": _told(before), "after": _told(after), "most": _most(seen),
        "every_half_minute": [
            {"at_s": at, "memory_mib": one.memory_mib, "caches_mib": one.caches_mib}
            for at, one in timeline[::6]
        ],
    }  # fmt: skip


def _told(state: State) -> dict[str, Any]:
    return state._asdict() | {"own_mib": {kind: round(size, 1) for kind, size in state.own_mib.items()}}


def _most(seen: list[State]) -> dict[str, Any]:
    counts = {name: max(getattr(one, name) for one in seen) for name in State._fields[:4]}
    kinds = {kind for one in seen for kind in one.memory_mib}
    return counts | {
        "memory_mib": {kind: max(one.memory_mib.get(kind, 0.0) for one in seen) for kind in sorted(kinds)}
    }


def verdict(found: dict[str, Any]) -> list[str]:
    """What is not as it should be; empty if all is well."""
    before, after, wrong = found["before"], found["after"], []
    if found["num_failures"] or found["answers_5xx"]:
        wrong.append(f"{found['num_failures']} requests failed, 5xx: {found['answers_5xx']}")
    for name in ("pages_held", "running", "sockets", "processes"):
        if after[name] > before[name]:
            wrong.append(f"{name} was {before[name]:g} and is {after[name]:g}")
    for kind, size in after["own_mib"].items():
        start = before["own_mib"].get(kind, 0.0)
        if size > max(start * _GROWTH, start + _SLACK_MIB):
            wrong.append(f"memory of {kind} was {start:g} MiB and is {size:g} MiB, caches not counted")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a checkpoint folder; the embedded model without it")
    parser.add_argument("--json", type=Path, help="where the figures go")
    asked = parser.parse_args()
    if not 0 < asked.minutes <= 10:
        parser.error("--minutes must be more than 0 and at most 10")
    port = free_port()
    flags = ["--port", str(port), "--log-level", "error", "--kv-mb", "64"]
    flags += ["--media-workers", "1"]  # a second one would begin whenever two pictures first meet
    flags += ["--model", asked.model] if asked.model else []
    server = subprocess.Popen([sys.executable, "-m", "duomo.serve", *flags], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(port)
        _wait_until_ready(url)
        found = asyncio.run(soak(url, server.pid, asked.clients, asked.minutes, asked.seed))
    finally:
        server.terminate()
        code = server.wait(timeout=60)
    found["exit_code"] = code
    wrong = verdict(found) + ([f"the server ended with {code}"] if code else [])
    found["wrong"] = wrong
    print(json.dumps(found, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if wrong else 0


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the model was not ready within 300 s")


if __name__ == "__main__":
    sys.exit(main())
