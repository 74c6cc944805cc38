"""How fast packed weights are multiplied: `python -m duomo.bench.kernels [--seconds 0.5] [--json FILE]`.

Weights per second of one token through one matrix, the best of many rounds: in cache on one thread against
our own int8 kernel. From memory, on all threads: one matrix a call and a token's experts in one call, as
decoding reads them, each round beside one of a plain reader of as many bytes; medians, and the median of the
rounds' shares, since what memory gives changes within seconds. Prefill is the same matrix under many tokens.
`--head` times the 28B's head alone, at 8 and at 6 bits.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from duomo import _native
from duomo.kernels.weights import IntWeight, PackedWeight, TrellisWeight
from duomo.trellis import LCC2_10, LCC2_12, LCC2_14, LCC4_12, TrellisBank, TrellisCode, int_tensor

ROWS, COLUMNS = 3072, 2560  # gate and up of a text expert of VL-28B-A3B
CHOSEN = 6  # experts of a token
HEAD_ROWS = 103_424  # of its embeddings, which are its head
CODES = (LCC2_10, LCC2_12, LCC2_14, LCC4_12)
ISAS = ("avx512", "avx2", "portable", "neon")


def random_bank(code: TrellisCode, count: int, rows: int = ROWS, columns: int = COLUMNS) -> TrellisWeight:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, count * rows * columns * code.bits // 8, np.uint8)
    scale = np.full((count, rows), 0.02, np.float16)
    return TrellisWeight(TrellisBank(code, codes.reshape(count, -1), scale, (count, rows, columns), 1))


def random_integers(bits: int, rows: int = ROWS) -> IntWeight:
    most = (1 << (bits - 1)) - 1
    levels = np.random.default_rng(0).integers(-most, most + 1, (rows, COLUMNS), np.int8)
    return IntWeight(int_tensor(levels, np.full(rows, 0.02, np.float16), bits, 1))


def product(weight: PackedWeight, tokens: int = 1) -> Callable[[int], None]:
    """A call that multiplies `tokens` rows by matrix `index`, without Python's part of packed_linear."""
    x, y = torch.randn(tokens, COLUMNS), torch.empty(tokens, weight.rows)
    native, places = weight.native, (x.data_ptr(), tokens, y.data_ptr())

    def run(index: int = 0, keep: tuple[torch.Tensor, ...] = (x, y)) -> None:
        if isinstance(weight, IntWeight):
            native.linear(*places)
        else:
            native.linear(index, *places)

    return run


def best_seconds(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Least time of each call, in turns, for about `seconds` each."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure_cache(isa: str, seconds: float) -> dict[str, float]:
    """G weights/s of one thread over one matrix, again and again."""
    _native.set_isa(isa)
    _native.set_num_threads(1)
    weights: dict[str, PackedWeight] = {code.name: random_bank(code, 1) for code in CODES}
    weights |= {f"int{bits}": random_integers(bits) for bits in (8, 6)}
    best = best_seconds({name: partial(product(weight), 0) for name, weight in weights.items()}, seconds)
    return {name: ROWS * COLUMNS / value / 1e9 for name, value in best.items()}


def measure_memory(code: TrellisCode, seconds: float, num_bytes: int = 1 << 29) -> dict[str, float]:
    """GB/s of all threads over a bank far larger than the caches, and of a plain reader over it."""
    _native.set_isa("")
    _native.set_num_threads(0)
    count = num_bytes * 8 // code.bits // (ROWS * COLUMNS)
    weight = random_bank(code, count)
    flat = weight.stored.codes.reshape(-1)
    x, y = torch.randn(1, COLUMNS), torch.empty(1, ROWS)
    places = x.data_ptr(), 1, y.data_ptr()
    calls = [partial(weight.native.linear, index, *places) for index in range(count)]

    def all_matrices() -> None:
        for call in calls:
            call()

    def read() -> None:
        _native.read_all(flat)

    return beside_reader(all_matrices, read, flat.nbytes, seconds)


def measure_experts(code: TrellisCode, seconds: float, num_bytes: int = 1 << 29) -> dict[str, float]:
    """The same for what decoding reads in one call: the experts that a token chose, gate, up and down."""
    _native.set_isa("")
    _native.set_num_threads(0)
    count = num_bytes * 8 // code.bits // (ROWS * COLUMNS * 3 // 2) // CHOSEN * CHOSEN
    gate_up, down = random_bank(code, count), random_bank(code, count, COLUMNS, ROWS // 2)
    x, weights, out = torch.randn(1, COLUMNS), torch.full((1, CHOSEN), 1 / CHOSEN), torch.empty(1, COLUMNS)
    ids = torch.randperm(count, generator=torch.Generator().manual_seed(0)).reshape(-1, 1, CHOSEN)

    def all_experts() -> None:
        for chosen in ids:
            places = x.data_ptr(), chosen.data_ptr(), weights.data_ptr(), 1, CHOSEN, out.data_ptr()
            _native.experts(gate_up.native, down.native, *places)

    flat = [bank.stored.codes.reshape(-1) for bank in (gate_up, down)]

    def read() -> None:
        for codes in flat:
            _native.read_all(codes)

    return beside_reader(all_experts, read, sum(codes.nbytes for codes in flat), seconds)


def measure_head(seconds: float) -> dict[str, dict[str, float]]:
    """The 28B's head for one token on all threads, at 8 and at 6 bits: ms, GB/s, the reader beside it."""
    _native.set_isa("")
    _native.set_num_threads(0)
    found = {}
    for bits in (8, 6):
        weight = random_integers(bits, HEAD_ROWS)
        flat = weight.stored.codes.view(np.uint8).reshape(-1)
        row = beside_reader(
            partial(product(weight), 0), partial(_native.read_all, flat), flat.nbytes, seconds
        )
        found[f"{bits} bits"] = {"ms": flat.nbytes / row["product"] / 1e6} | row
    return found


def beside_reader(
    multiply: Callable[[], object], read: Callable[[], object], num_bytes: int, seconds: float
) -> dict[str, float]:
    """GB/s of both at the median of rounds in which they take turns, and of the rounds' shares."""
    rows = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times = [time.perf_counter()]
        for call in (multiply, read):
            call()
            times.append(time.perf_counter())
        rows.append(np.diff(times))
    product_s, reader_s = np.asarray(rows).T
    return {
        "product": float(num_bytes / np.median(product_s) / 1e9),
        "reader": float(num_bytes / np.median(reader_s) / 1e9),
        "share": float(np.median(reader_s / product_s)),
    }


def measure_prefill(seconds: float, tokens: int = 512) -> dict[str, float]:
    """G multiply-adds/s of all threads with many tokens; torch's bf16 product beside it."""
    _native.set_isa("")
    _native.set_num_threads(0)
    x, matrix = torch.randn(tokens, COLUMNS).bfloat16(), torch.randn(ROWS, COLUMNS).bfloat16()
    weights: dict[str, PackedWeight] = {code.name: random_bank(code, 1) for code in (LCC2_12, LCC4_12)}
    weights |= {f"int{bits}": random_integers(bits) for bits in (8, 6)}
    calls: dict[str, Callable[[], object]] = {n: partial(product(w, tokens), 0) for n, w in weights.items()}
    calls["torch bf16"] = partial(torch.nn.functional.linear, x, matrix)
    best = best_seconds(calls, seconds)
    return {name: tokens * ROWS * COLUMNS / value / 1e9 for name, value in best.items()}


def measure_all(seconds: float) -> dict[str, object]:
    figures: dict[str, object] = {}
    for isa in ISAS:
        _native.set_isa(isa)
        if _native.current_isa() == isa:
            figures[f"in cache, one thread, {isa} (G weights/s)"] = measure_cache(isa, seconds)
    for code in (LCC2_12, LCC4_12):
        figures[f"from memory, all threads, {code.name} (GB/s)"] = measure_memory(code, 4 * seconds)
        figures[f"a token's experts, all threads, {code.name} (GB/s)"] = measure_experts(code, 4 * seconds)
    figures["512 tokens, all threads (G multiply-adds/s)"] = measure_prefill(seconds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--head", action="store_true", help="only the 28B's head")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    figures: dict[str, object] = {"machine": platform.processor() or platform.machine()}
    if not options.head:
        figures |= measure_all(options.seconds)
    for name, head in measure_head(4 * options.seconds).items():
        figures[f"head of {HEAD_ROWS:,} x {COLUMNS:,}, one token, {name} (ms, GB/s)"] = head
    for name, value in figures.items():
        shown = ", ".join(f"{k} {v:.3g}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {shown}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
