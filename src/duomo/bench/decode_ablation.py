"""`python -m duomo.bench.decode_ablation CHECKPOINT`: what makes decoding fast, and where its time goes.

One model, one stream after a short prompt, the variants taking turns; medians of a step over all rounds. Each
variant is the finished system less one thing, so the ratio is what that thing is worth beside all others. The
finished system's step is also told by part. For a checkpoint of full size, as `duomo synth` writes.
`--contexts 64 4096` compares lengths of context instead: keys and values before the first step are drawn at
random, since what attention costs does not depend on them, and a prompt of that length takes a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from duomo import _native
from duomo.bench.decode import NativeClock, Streams, ask_layers, read_bytes_per_s
from duomo.checkpoints import load_model
from duomo.checkpoints.fit import read_per_token
from duomo.checkpoints.inventory import take_inventory
from duomo.model import Ernie

FULL = "all of it"
WARM_UP = 24


@contextmanager
def as_it_is(model: Ernie) -> Iterator[None]:
    yield


@contextmanager
def layer_by_layer(model: Ernie) -> Iterator[None]:
    ask_layers(model)
    try:
        yield
    finally:
        del model.decoder.forward


@contextmanager
def one_thread(model: Ernie) -> Iterator[None]:
    _native.set_num_threads(1)
    try:
        yield
    finally:
        _native.set_num_threads(0)


def lower(isa: str) -> Callable[[Ernie], Any]:
    @contextmanager
    def lowered(model: Ernie) -> Iterator[None]:
        _native.set_isa(isa)
        try:
            yield
        finally:
            _native.set_isa("")

    return lowered


VARIANTS: dict[str, tuple[Callable[[Ernie], Any], int]] = {
    FULL: (as_it_is, 1),
    "layers called one by one": (layer_by_layer, 1),
    "one thread": (one_thread, 1),
    "AVX2": (lower("avx2"), 1),
    "without vector instructions": (lower("portable"), 16),
}
"""How the model is changed while it runs; what a round's steps are divided by, where one takes seconds."""


def run(checkpoint: Path, prompt: int, rounds: int, steps: int) -> dict[str, Any]:
    model = load_model(checkpoint)
    bound = read_bytes_per_s()
    most = prompt + WARM_UP + steps + rounds * (steps + 1) * len(VARIANTS)
    stream = Streams(model, 1, most, "bfloat16")
    stream.step(prompt)
    for _ in range(WARM_UP):  # until every expert has been in memory
        stream.step()
    seconds: dict[str, list[float]] = {title: [] for title in VARIANTS}
    for _ in range(rounds):
        for title, (changed, divisor) in VARIANTS.items():
            with changed(model):
                stream.step()
                seconds[title] += [stream.step() for _ in range(max(1, steps // divisor))]
    with NativeClock() as clock:
        total = sum(stream.step() for _ in range(steps))
    bound = max(bound, read_bytes_per_s())
    full = median(seconds[FULL])
    rows = {
        title: {"ms": 1e3 * median(own), "tokens_per_s": 1 / median(own), "ratio": median(own) / full}
        for title, own in seconds.items()
    }
    return {
        "rows": rows,
        "parts_ms": {
            **{name: 1e3 * own / steps for name, own in clock.seconds.items()},
            "outside native calls": 1e3 * (total - sum(clock.seconds.values())) / steps,
        },
        "read_bytes_per_s": bound,
        "bytes_per_token": sum(read_per_token(take_inventory(checkpoint)).values()),
        "steps_ms": {title: [round(1e3 * x, 2) for x in own] for title, own in seconds.items()},
    }


def by_context(checkpoint: Path, contexts: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Streams of different lengths taking turns: milliseconds of a step at the median."""
    model = load_model(checkpoint)
    streams = {
        length: Streams(model, 1, length + 40 + rounds * (steps + 1), "bfloat16") for length in contexts
    }
    for length, stream in streams.items():
        stream.cache.store.normal_()
        stream.num_cached = length
        for _ in range(32 // len(contexts)):  # until every expert has been in memory
            stream.step()
    seconds: dict[int, list[float]] = {length: [] for length in contexts}
    for _ in range(rounds):
        for length, stream in streams.items():
            stream.step()
            seconds[length] += [stream.step() for _ in range(steps)]
    return {
        str(length): {"ms": 1e3 * median(own), "steps_ms": [round(1e3 * x, 2) for x in own]}
        for length, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16, help="of each variant in a round")
    parser.add_argument("--contexts", type=int, nargs="+", help="compare these lengths instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.contexts:
        lengths = by_context(options.checkpoint, options.contexts, options.rounds, options.steps)
        for length, row in lengths.items():
            print(f"after {length:>6} tokens{row['ms']:10.1f} ms{1e3 / row['ms']:8.2f} tokens/s")
        if options.json:
            options.json.write_text(json.dumps(lengths, indent=1) + "\n", encoding="utf-8")
        return
    found = run(options.checkpoint, options.prompt, options.rounds, options.steps)
    for title, row in found["rows"].items():
        print(f"{title:30}{row['ms']:10.1f} ms{row['tokens_per_s']:8.2f} tokens/s{row['ratio']:8.2f}")
    for name, own in found["parts_ms"].items():
        print(f"  {name:28}{own:10.2f} ms")
    share = found["rows"][FULL]["tokens_per_s"] * found["bytes_per_token"] / found["read_bytes_per_s"]
    print(f"reader {found['read_bytes_per_s'] / 1e9:.1f} GB/s, share of its bound {share:.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
