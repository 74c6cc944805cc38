"""`python -m duomo.bench.cap CHECKPOINT...`: what a cap on memory costs, for even and for skewed routing.

For every checkpoint, in turn: decoding one stream of random text without a cap, and under one, after a
warm-up that lets the cap learn its favourites. Under the cap, what is given up leaves the system's cache
too, so every miss is read from disk as on a machine that has no more memory. Then the same stream again
while another request brings a prompt of 64 new tokens, which need nearly every expert: how long the first
waits between tokens.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from duomo.bench.memory import random_ids, resident_bytes
from duomo.checkpoints.fit import parse_bytes
from duomo.checkpoints.inventory import take_inventory
from duomo.checkpoints.pages import cached_bytes
from duomo.checkpoints.settings import settle
from duomo.engine.request import SamplingParams
from duomo.llm import LLM

SAMPLED = SamplingParams(temperature=1.0, max_tokens=4, seed=1, ignore_eos=True, thinking="off")


def open_model(checkpoint: Path, cap_bytes: int | None) -> LLM:
    llm = LLM.open(checkpoint, max_model_tokens=4096, max_sequences=4)
    if cap_bytes is not None:
        llm.engine.runner.set_cap(cap_bytes, is_strict=True)  # type: ignore[union-attr]
    return llm


def decode_s(llm: LLM, num_tokens: int, seed: int) -> list[float]:
    """Seconds between the tokens of one stream after a prompt of 16 random tokens."""
    times = []
    params = replace(SAMPLED, seed=seed, max_tokens=num_tokens)
    for _ in llm.stream_generate(random_ids(llm, 16, seed), params):
        times.append(time.perf_counter())
    return [later - sooner for sooner, later in pairwise(times)]


def beside_a_prompt_s(llm: LLM, num_tokens: int, seed: int) -> list[float]:
    """The same, while another request brings a prompt of 64 tokens after the fourth token."""
    other = threading.Thread(target=lambda: llm.generate(random_ids(llm, 64, seed + 100), SAMPLED))
    times = []
    params = replace(SAMPLED, seed=seed, max_tokens=num_tokens)
    for _ in llm.stream_generate(random_ids(llm, 16, seed), params):
        times.append(time.perf_counter())
        if len(times) == 4:
            other.start()
    other.join()
    return [later - sooner for sooner, later in pairwise(times[4:])]


def weights_cap(checkpoint: Path, ram_bytes: int) -> int | None:
    return settle(take_inventory(checkpoint), ram_bytes).weights_cap_bytes


def measure(checkpoint: Path, ram_bytes: int | None, num_tokens: int, warm_up: int) -> dict[str, Any]:
    cap = weights_cap(checkpoint, ram_bytes) if ram_bytes else None
    with open_model(checkpoint, cap) as llm:
        decode_s(llm, warm_up, seed=1)
        before = llm.stats()
        gaps = decode_s(llm, num_tokens, seed=2)
        after = llm.stats()
        assert llm.residency is not None
        pools = llm.residency.pools.values()
        found: dict[str, Any] = {
            "checkpoint": checkpoint.name,
            "ram_bytes": ram_bytes,
            "weights_cap_bytes": cap,
            "tokens_per_s": round(len(gaps) / sum(gaps), 3),
            "median_gap_ms": round(1e3 * median(gaps), 1),
            "longest_gap_ms": round(1e3 * max(gaps), 1),
            "process_bytes": resident_bytes()["all"],
            "cached_pool_bytes": sum(cached_bytes(pool.ranges) or 0 for pool in pools),
        }
        for name in ("expert_hits", "expert_misses", "expert_read_bytes", "expert_stops"):
            if name in after:
                found[name] = after[name] - before[name]
        if cap is not None:
            asked = found["expert_hits"] + found["expert_misses"]
            found["hit_rate"] = round(found["expert_hits"] / asked, 4)
        beside = beside_a_prompt_s(llm, num_tokens // 2, seed=2)
        found["beside_a_prompt"] = {
            "median_gap_ms": round(1e3 * median(beside), 1),
            "longest_gap_ms": round(1e3 * max(beside), 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--ram", default="5G")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for checkpoint in options.checkpoints:
        for ram in (None, parse_bytes(options.ram)):
            rows.append(measure(checkpoint, ram, options.tokens, options.warm_up))
            print(json.dumps(rows[-1]), flush=True)
        print(f"{checkpoint.name}: {rows[-2]['tokens_per_s'] / rows[-1]['tokens_per_s']:.2f} times slower")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
