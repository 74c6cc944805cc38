"""`python -m duomo.evals.latency MODEL`: how long an answer takes, thinking and not, and a verdict over HTTP.

One client, one request at a time. The first part asks one engine the same held-out questions in both modes
and compares the medians; the second starts the real server on the same model and posts pictures of parts,
one at a time, until OK or NG has come back.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from duomo.engine.request import SamplingParams
from duomo.evals.contrast import REASONED
from duomo.evals.questions import Question, message_of, picture_png
from duomo.llm import LLM
from duomo.tasks.families import FAMILIES
from duomo.tasks.pools import Pools, load_pools

SEED = 452
MAX_TOKENS = 160
FORCED_WORDS = ["OK", "NG"]


def asked_both_ways(pools: Pools, num: int) -> list[tuple[Question, Question]]:
    """`num` pairs over the kinds where steps matter: one question without and with thinking."""
    from duomo.evals.questions import question_of

    pairs = []
    for index, kind in enumerate(REASONED):
        rng = np.random.default_rng([SEED, index])
        name, wanted = kind.split("/")[0], num // len(REASONED)
        while wanted:
            example = FAMILIES[name](rng, pools)
            turn = next((t for t in example.turns if t.kind == kind), None)
            if turn is not None:
                direct = question_of(example, turn)
                pairs.append((direct, direct.with_thinking()))
                wanted -= 1
    return pairs


def compare_modes(model: LLM, pairs: Sequence[tuple[Question, Question]]) -> dict[str, Any]:
    """Seconds from an encoded picture to the whole answer, by turns; the first pair only warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in [pairs[0], *pairs]:
        model.reset_caches()
        for question, found in zip(pair, seconds, strict=True):
            params = SamplingParams(max_tokens=MAX_TOKENS, thinking="on" if question.thinking else "off")
            message = message_of(question)  # encoding the picture is the asker's work
            begun = time.perf_counter()
            model.chat([message], params)
            found.append(time.perf_counter() - begun)
            model.reset_caches()
    direct, thinking = (statistics.median(found[1:]) for found in seconds)
    return {
        "num": len(pairs),
        "direct_ms": round(1000 * direct, 1),
        "thinking_ms": round(1000 * thinking, 1),
        "sooner": round(1 - direct / thinking, 3),
    }


def time_verdicts(url: str, pools: Pools, num: int) -> dict[str, Any]:
    """Milliseconds from a picture in hand to the verdict read, every picture a new one."""
    rng, times, forms = np.random.default_rng([SEED, 99]), [], 0
    with httpx.Client(timeout=60) as client:
        for index in range(num + 3):
            example = FAMILIES["surface"](rng, pools)
            assert example.picture is not None
            encoded = base64.b64encode(picture_png(example.picture)).decode()
            picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
            content = [picture, {"type": "text", "text": example.turns[0].question}]
            body = {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 4,
                "temperature": 0,
                "chat_template_kwargs": {"enable_thinking": False},
                "guided_choice": FORCED_WORDS,
            }
            begun = time.perf_counter()
            reply = client.post(f"{url}/v1/chat/completions", json=body)
            verdict = reply.raise_for_status().json()["choices"][0]["message"]["content"]
            if index >= 3:  # the first ones warm the server up
                times.append(1000 * (time.perf_counter() - begun))
                forms += verdict in FORCED_WORDS
    ordered = sorted(times)
    return {
        "num": num,
        "verdicts": forms,
        "p50_ms": round(statistics.median(ordered), 1),
        "p95_ms": round(ordered[max(0, int(0.95 * num + 0.5) - 1)], 1),
        "most_ms": round(ordered[-1], 1),
    }


@contextmanager
def served(model: Path | None) -> Iterator[str]:
    """A real server on a free port, ended afterwards; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "duomo",
        "serve",
        *(["--model", str(model)] if model else []),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _wait(url: str, server: subprocess.Popen[bytes], limit_s: float = 120) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < limit_s and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit("the server did not answer; run `duomo serve` by hand to see why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint; the embedded model if none")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where fetched packages lie")
    parser.add_argument("--pairs", type=int, default=80, help="questions asked both ways")
    parser.add_argument("--parts", type=int, default=200, help="pictures posted")
    parser.add_argument("--json", type=Path, help="also write the result here")
    given = parser.parse_args()
    pools = load_pools(given.cache, "test")
    result: dict[str, Any] = {"machine": platform.machine(), "date": time.strftime("%Y-%m-%d")}
    if given.pairs:
        with LLM.open(given.model) as model:
            result["modes"] = compare_modes(model, asked_both_ways(pools, given.pairs))
    if given.parts:
        with served(given.model) as url:
            result["verdict"] = time_verdicts(url, pools, given.parts)
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
