"""What a step costs beside the model: `python -m duomo.bench.steps [--requests 64] [--json FILE]`.

Figures of the embedded model while all requests are decoding, medians over steps: scheduling (deciding who
runs, without the model), everything of the engine outside the forward pass, all that is not inside a native
call (Python, torch and numpy, within the pass and outside), and the whole step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from duomo.bench.beside_vllm import ENGINE_OPTIONS
from duomo.bench.workload import Workload
from duomo.engine.engine import Engine
from duomo.engine.opening import open_engine
from duomo.engine.request import Request, SamplingParams
from duomo.llm import embedded_folder
from duomo.processing.tokenizer import Tokenizer


class _Timed:
    """A native object whose calls are timed."""

    def __init__(self, native: Any, clock: list[float]) -> None:
        self._native, self._clock = native, clock

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._native, name)

        def timed(*given: Any) -> Any:
            begun = time.perf_counter()
            result = call(*given)
            self._clock[0] += time.perf_counter() - begun
            return result

        return timed


def _time_native_calls(engine: Engine) -> list[float]:
    """Seconds inside native calls so far, in a list of one. Call it after a first step, which makes them."""
    clock = [0.0]
    model = engine.runner.model  # type: ignore[attr-defined]
    fused, head = model.decoder._fused, model.embed.panels
    assert fused is not None and head is not None, "the embedded model is one native call and a head"
    fused._native = _Timed(fused._native, clock)
    head.__dict__["native"] = _Timed(head.native, clock)
    return clock


def measure(num_requests: int, num_tokens: int = 64) -> dict[str, Any]:
    folder = embedded_folder()
    engine = open_engine(folder, Tokenizer.load(folder), **ENGINE_OPTIONS)[0]
    _ask(engine, num_requests, num_tokens, "warm")
    while engine.step():
        pass
    native = _time_native_calls(engine)
    _ask(engine, num_requests, num_tokens, "timed")
    whole, beside, schedule, foreign = [], [], [], []
    while True:
        before, native_before, begun = engine.counters.model_s, native[0], time.perf_counter()
        if not engine.step():
            break
        seconds = time.perf_counter() - begun
        if all(not s.is_prefilling for s in engine.scheduler.running) and engine.scheduler.running:
            whole.append(seconds * 1e3)
            beside.append((seconds - engine.counters.model_s + before) * 1e3)
            schedule.append(engine.counters.last_schedule_s * 1e3)
            foreign.append((seconds - native[0] + native_before) * 1e3)
    return {
        "requests": num_requests,
        "threads": torch.get_num_threads(),
        "step_ms": statistics.median(whole),
        "scheduling_ms": statistics.median(schedule),
        "outside_the_pass_ms": statistics.median(beside),
        "outside_native_calls_ms": statistics.median(foreign),
        "outside_native_calls_share": statistics.median(foreign) / statistics.median(whole),
    }


def _ask(engine: Engine, num_requests: int, num_tokens: int, name: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, thinking="off")
    work = Workload(num_requests, 16, num_tokens)
    for index in range(num_requests):
        ids = tuple(work.ids(index, 4096))
        engine.submit(Request(f"{name}-{index}", ids, params), lambda output: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = [measure(count) for count in args.requests]
    for row in report:
        print(row)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
