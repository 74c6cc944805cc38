"""What a step costs beside the model: `python -m duomo.bench.steps [--requests 64] [--json FILE]`.

Three figures of the embedded model while all requests are decoding, medians over steps: scheduling (deciding
who runs, without the model), everything of the engine outside the forward pass, and the whole step. The share
of Python is an upper bound: what a profiler sees in Python functions, its own cost included.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
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

_NATIVE_WRAPPERS = ("kernels/cpu/",)  # a profiler does not see the native calls that these make


def measure(num_requests: int, num_tokens: int = 64) -> dict[str, Any]:
    folder = embedded_folder()
    engine = open_engine(folder, Tokenizer.load(folder), **ENGINE_OPTIONS)[0]
    _ask(engine, num_requests, num_tokens, "warm")
    while engine.step():
        pass
    _ask(engine, num_requests, num_tokens, "timed")
    whole, beside, schedule = [], [], []
    while True:
        before, begun = engine.counters.model_s, time.perf_counter()
        if not engine.step():
            break
        seconds = time.perf_counter() - begun
        if all(not s.is_prefilling for s in engine.scheduler.running) and engine.scheduler.running:
            whole.append(seconds * 1e3)
            beside.append((seconds - engine.counters.model_s + before) * 1e3)
            schedule.append(engine.counters.last_schedule_s * 1e3)
    return {
        "requests": num_requests,
        "threads": torch.get_num_threads(),
        "step_ms": statistics.median(whole),
        "scheduling_ms": statistics.median(schedule),
        "outside_the_pass_ms": statistics.median(beside),
        "python_share_at_most": _python_share(engine, num_requests, num_tokens),
    }


def _ask(engine: Engine, num_requests: int, num_tokens: int, name: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, thinking="off")
    work = Workload(num_requests, 16, num_tokens)
    for index in range(num_requests):
        ids = tuple(work.ids(index, 4096))
        engine.submit(Request(f"{name}-{index}", ids, params), lambda output: None)


def _python_share(engine: Engine, num_requests: int, num_tokens: int) -> float:
    _ask(engine, num_requests, num_tokens, "profiled")
    while any(s.is_prefilling for s in engine.scheduler.running) or not engine.scheduler.running:
        engine.step()
    profile = cProfile.Profile()
    profile.enable()
    while engine.step():
        pass
    profile.disable()
    python = total = 0.0
    for (file, _, _), (_, _, own_s, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own_s
        if file != "~" and not any(part in file for part in _NATIVE_WRAPPERS):
            python += own_s
    return python / total


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
