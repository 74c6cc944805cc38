"""Any OpenAI-compatible server measured from outside, over HTTP, as its users see it.

Requests arrive by a Poisson process of the given rate, or all at once up to a concurrency. Output tokens are
the server's own count from `usage`; pieces of the stream give the times. A piece has the tokens whose ids it
carries (`return_token_ids`); where a server gives no ids, a piece of text counts as one token.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from duomo.bench.report import Row, summarize
from duomo.bench.workload import Workload
from duomo.processing.messages import ImagePart, Message, TextPart


def measure_server(
    url: str,
    workload: Workload,
    *,
    model: str = "default",
    concurrency: int = 8,
    rate_per_s: float | None = None,
    api_key: str | None = None,
) -> list[tuple[dict[str, Any], list[Row]]]:
    """One run; `url` is the server's root, such as http://127.0.0.1:8180."""
    begun = time.perf_counter()
    rows = asyncio.run(_run(url.rstrip("/"), workload, model, concurrency, rate_per_s, api_key))
    wall_s = time.perf_counter() - begun
    label = f"{rate_per_s:g}/s" if rate_per_s else f"{concurrency} at once"
    return [(summarize(rows, wall_s, label=label, url=url, model=model), rows)]


async def _run(
    url: str, workload: Workload, model: str, concurrency: int, rate: float | None, api_key: str | None
) -> list[Row]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    draw = random.Random(workload.seed)
    arrivals = [0.0]
    while len(arrivals) < workload.num_requests:
        arrivals.append(arrivals[-1] + (draw.expovariate(rate) if rate else 0.0))
    places = asyncio.Semaphore(concurrency if rate is None else workload.num_requests)
    async with httpx.AsyncClient(headers=headers, timeout=None) as client:

        async def held(index: int) -> Row:
            await asyncio.sleep(arrivals[index])
            async with places:
                return await _one(client, url, workload, model, index)

        return list(await asyncio.gather(*(held(index) for index in range(workload.num_requests))))


async def _one(client: httpx.AsyncClient, url: str, workload: Workload, model: str, index: int) -> Row:
    body = {
        "model": model,
        "messages": [_wire(message) for message in workload.messages(index)],
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    row = Row(sent_s=time.perf_counter())
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                row.error = f"HTTP {response.status_code}"
                return row
            async for event in _events(response):
                _take(row, event)
    except (httpx.HTTPError, ValueError) as error:
        row.error = type(error).__name__
    return row


def _take(row: Row, event: dict[str, Any]) -> None:
    if "error" in event:
        row.error = str(event["error"])
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        has_text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        count = len(choice.get("token_ids") or ()) or bool(has_text)
        if count:
            row.token_times_s.append(time.perf_counter())
            row.token_counts.append(int(count))
    usage = event.get("usage")
    if usage:
        row.input_tokens, row.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _wire(message: Message) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, ImagePart):
            url = "data:image/png;base64," + base64.b64encode(part.data).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": message.role, "content": content}
