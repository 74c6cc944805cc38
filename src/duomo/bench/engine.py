"""The engine measured in this process: throughput at several concurrencies, latency of one at a time.

Answers are forced to their full length (no natural end), so that every run does the same work. One request
of each kind runs first and is not counted. Prefixes are forgotten between runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from duomo.bench.report import Row, summarize
from duomo.bench.workload import Workload
from duomo.engine.request import Delta, SamplingParams
from duomo.errors import Error
from duomo.llm import LLM


def measure_throughput(
    llm: LLM, workload: Workload, concurrencies: Sequence[int] = (1, 8, 32)
) -> list[tuple[dict[str, Any], list[Row]]]:
    """One run at each concurrency; its figures and rows."""
    asyncio.run(_one(llm, workload, -1))
    runs = []
    for concurrency in concurrencies:
        llm.reset_caches()
        before = llm.stats()
        begun = time.perf_counter()
        rows = asyncio.run(_run(llm, workload, concurrency))
        wall_s = time.perf_counter() - begun
        after = llm.stats()
        steps = max(1.0, after["num_steps"] - before["num_steps"])
        figures = summarize(
            rows,
            wall_s,
            label=f"{concurrency} at once",
            concurrency=concurrency,
            model=llm.name,
            steps=steps,
            model_ms_per_step=1e3 * (after["model_s"] - before["model_s"]) / steps,
            scheduling_ms_per_step=1e3 * (after["scheduling_s"] - before["scheduling_s"]) / steps,
        )
        runs.append((figures, rows))
    return runs


def measure_latency(llm: LLM, workload: Workload) -> list[tuple[dict[str, Any], list[Row]]]:
    """One request at a time."""
    return measure_throughput(llm, workload, (1,))


async def _run(llm: LLM, workload: Workload, concurrency: int) -> list[Row]:
    places = asyncio.Semaphore(concurrency)

    async def held(index: int) -> Row:
        async with places:
            return await _one(llm, workload, index)

    return list(await asyncio.gather(*(held(index) for index in range(workload.num_requests))))


async def _one(llm: LLM, workload: Workload, index: int) -> Row:
    row = Row(sent_s=time.perf_counter())
    try:
        async for delta in _deltas(llm, workload, index):
            if delta.token_ids:
                row.token_times_s.append(time.perf_counter())
                row.token_counts.append(len(delta.token_ids))
                row.output_tokens += len(delta.token_ids)
            if delta.usage is not None:
                row.input_tokens = delta.usage.prompt_tokens
    except Error as error:
        row.error = error.message
    return row


def _deltas(llm: LLM, workload: Workload, index: int) -> AsyncIterator[Delta]:
    params = SamplingParams(temperature=0, max_tokens=workload.output_tokens, ignore_eos=True, thinking="off")
    if workload.pictures or workload.prompts:
        return llm.astream(workload.messages(index), params)
    return llm.astream_generate(workload.ids(index, llm.tokenizer.vocab_size), params)
