"""`python -m duomo.bench.decode CHECKPOINT`: a whole model at work, against what memory allows.

Prefill of one prompt, then decoding for one stream and for several at once, through the engine's paged
cache; a plain reader before and after says how fast this machine reads then. Meant for `duomo synth`
checkpoints of full size, whose speed and memory are real though their answers mean nothing: ids are drawn
from a seed, so that routing spreads over the experts. `--layers` takes the layers one call at a time, as
before the fused decoder; `--profile` adds how much of a step is spent inside native calls, and in which.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from duomo import _native
from duomo.checkpoints import load_model
from duomo.checkpoints.fit import read_per_token
from duomo.checkpoints.inventory import take_inventory
from duomo.engine.kv import PagedCache
from duomo.model import Batch, Ernie
from duomo.model.decoder import Decoder

SEED = 20261124
PAGE = 16
READ_BYTES = 1 << 29
KV_DTYPES = ("float32", "bfloat16", "int8")


def read_bytes_per_s() -> float:
    """The best of a few plain reads of memory far beyond the caches, by all threads of the kernels."""
    buffer = np.ones(READ_BYTES, np.uint8)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        _native.read_all(buffer)
        best = min(best, time.perf_counter() - started)
    return READ_BYTES / best


class Streams:
    """`count` sequences of random ids, each on its own pages, fed as fast as the model takes them."""

    def __init__(self, model: Ernie, count: int, most_tokens: int, kv_dtype: str) -> None:
        config = model.config
        limit = config.ids.image_patch if config.is_multimodal else config.vocab_size
        self.model, self.count = model, count
        self.num_cached = 0
        pages = -(-most_tokens // PAGE)
        self.cache = PagedCache(config, count * pages, PAGE, kv_dtype)
        self._table = 1 + torch.arange(count * pages).reshape(count, pages)
        self._ids = torch.from_numpy(
            np.random.default_rng(SEED + count).integers(3, limit, (count, most_tokens))
        )

    def step(self, num_new: int = 1) -> float:
        """Seconds of one forward pass over `num_new` tokens a stream, each one's last logits included."""
        started = time.perf_counter()
        places = torch.arange(self.num_cached, self.num_cached + num_new)
        tokens = self.count * num_new
        slots_ST = self._table[:, places // PAGE] * PAGE + places % PAGE
        batch = Batch(
            ids_T=self._ids[:, places].flatten(),
            positions_3T=places.repeat(self.count).expand(3, -1),
            text_rows=torch.arange(tokens),
            vision_rows=torch.empty(0, dtype=torch.int64),
            num_new=(num_new,) * self.count,
            num_cached=(self.num_cached,) * self.count,
            slots_T=slots_ST.flatten(),
            page_table_SM=self._table,
            sequence_T=torch.arange(self.count).repeat_interleave(num_new),
            num_keys_T=places.repeat(self.count) + 1,
            logit_rows=torch.arange(num_new - 1, tokens, num_new),
        )
        with torch.inference_mode():
            self.model.unembed(self.model(batch, self.cache))
        self.num_cached += num_new
        return time.perf_counter() - started


def decode_rate(streams: Streams, prompt: int, tokens: int) -> float:
    """All streams' tokens/s at the median step, after `prompt` tokens each and a few steps to warm up."""
    if streams.num_cached < prompt:
        streams.step(prompt - streams.num_cached)
    for _ in range(4):
        streams.step()
    return streams.count / median(streams.step() for _ in range(tokens))


class NativeClock:
    """Seconds inside the native module's functions and methods, by name, while it is entered.

    A profiler books them under the Python function that calls, so they are wrapped; what that costs counts
    as Python's.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> NativeClock:
        owners: list[Any] = [_native, *(item for item in vars(_native).values() if isinstance(item, type))]
        for owner in owners:
            for name, call in list(vars(owner).items()):
                if callable(call) and not isinstance(call, type) and not name.startswith("__"):
                    self._originals.append((owner, name, call))
                    title = name if owner is _native else f"{owner.__name__}.{name}"
                    setattr(owner, name, self._timed(title, call))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, call in self._originals:
            setattr(owner, name, call)
        self._originals.clear()

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return timed


def profile(streams: Streams, tokens: int) -> dict[str, Any]:
    """Native milliseconds of a step by function, and the share of it that is not inside a native call."""
    streams.step()  # whatever is made once
    with NativeClock() as clock:
        total = sum(streams.step() for _ in range(tokens))
    return {
        "ms_a_step": round(1e3 * total / tokens, 3),
        "share_outside_native": round(1 - sum(clock.seconds.values()) / total, 4),
        "native_ms_a_step": {name: round(1e3 * own / tokens, 4) for name, own in clock.seconds.items()},
    }


def measure(model: Ernie, options: argparse.Namespace, bytes_per_token: int) -> dict[str, Any]:
    before = read_bytes_per_s()
    most = options.prompt + 3 * options.tokens + 8
    one = Streams(model, 1, most, options.kv)
    cold = one.step(options.prompt)
    warm = Streams(model, 1, most, options.kv).step(options.prompt)
    facts: dict[str, Any] = {
        "prompt_tokens": options.prompt,
        "prefill_tokens_per_s": options.prompt / warm,
        "first_prefill_tokens_per_s": options.prompt / cold,
    }
    single = [decode_rate(one, options.prompt, options.tokens)]
    if options.streams > 1:
        many = Streams(model, options.streams, most, options.kv)
        facts[f"decode_{options.streams}_streams_tokens_per_s"] = decode_rate(
            many, min(options.prompt, 64), options.tokens
        )
    single.append(decode_rate(one, options.prompt, options.tokens))
    after = read_bytes_per_s()
    bandwidth = max(before, after)
    rate = single[-1]  # in the first some experts are brought into memory
    return {
        **facts,
        "decode_tokens_per_s": rate,
        "decode_tokens_per_s_rounds": single,
        "read_bytes_per_s": bandwidth,
        "read_bytes_per_s_before_and_after": [before, after],
        "bytes_per_token": bytes_per_token,
        "bound_tokens_per_s": bandwidth / bytes_per_token,
        "share_of_bound": rate * bytes_per_token / bandwidth,
        **({"profile": profile(one, min(options.tokens, 16))} if options.profile else {}),
    }


def show(facts: dict[str, Any], depth: int = 0) -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            print("  " * depth + f"{name}:")
            show(value, depth + 1)
        else:
            print("  " * depth + f"{name}: " + (f"{value:.4g}" if isinstance(value, float) else f"{value}"))


def ask_layers(model: Ernie) -> None:
    """From now on, until `decoder.forward` is deleted, every layer is a call of its own."""
    decoder = model.decoder
    decoder.forward = lambda *given: Decoder.forward(decoder, *given)  # type: ignore[method-assign]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="steps timed in each round")
    parser.add_argument("--streams", type=int, default=8, help="streams that decode together (1: none)")
    parser.add_argument("--kv", choices=KV_DTYPES, default="bfloat16", help="how keys and values are kept")
    parser.add_argument("--layers", action="store_true", help="layer by layer, without the fused decoder")
    parser.add_argument("--profile", action="store_true", help="say where a step's time goes")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    model = load_model(options.checkpoint)
    loaded = time.perf_counter() - started
    if options.layers:
        ask_layers(model)
    per_token = sum(read_per_token(take_inventory(options.checkpoint)).values())
    facts = {
        "threads": _native.num_threads(),
        "isa": _native.current_isa(),
        "kv": options.kv,
        "is_fused": not options.layers,
        "load_s": loaded,
        **measure(model, options, per_token),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    show(facts)
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
