"""`python -m duomo.bench.decode CHECKPOINT`: one stream through a whole model, prefill, then token by token.

Meant for `duomo synth` checkpoints of full size, whose speed and memory are real though their answers mean
nothing. Prints the medians; ids are drawn from a seed, so that routing spreads over the experts.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from duomo.checkpoints import load_model
from duomo.model import Batch, Ernie, PlainCache, build_batch

SEED = 20261124


def step_seconds(model: Ernie, cache: PlainCache, ids: Sequence[int], num_cached: int) -> float:
    """Seconds of one forward pass of `ids` after `num_cached` tokens, the last token's logits included."""
    fresh = build_batch([ids], model.config)
    batch = Batch(
        ids_T=fresh.ids_T,
        positions_3T=fresh.positions_3T + num_cached,
        text_rows=fresh.text_rows,
        vision_rows=fresh.vision_rows,
        num_new=fresh.num_new,
        num_cached=(num_cached,),
    )
    started = time.perf_counter()
    with torch.inference_mode():
        model.unembed(model(batch, cache)[-1:])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded after it")
    options = parser.parse_args()
    started = time.perf_counter()
    model = load_model(options.checkpoint)
    print(f"loaded in {time.perf_counter() - started:.1f} s")
    limit = model.config.ids.image_patch if model.config.is_multimodal else model.config.vocab_size
    ids = np.random.default_rng(SEED).integers(3, limit, options.prompt + 2 * options.tokens).tolist()
    cache = PlainCache()
    prefill = step_seconds(model, cache, ids[: options.prompt], 0)
    print(f"prefill of {options.prompt} tokens: {options.prompt / prefill:.1f} tokens/s, pages still cold")
    for round_name, first in (("first", options.prompt), ("second", options.prompt + options.tokens)):
        times = [step_seconds(model, cache, [ids[first + i]], first + i) for i in range(options.tokens)]
        print(f"decode, {round_name} {options.tokens}: {1 / median(times):.2f} tokens/s at the median step")
    warm = step_seconds(model, PlainCache(), ids[: options.prompt], 0)
    print(f"prefill again: {options.prompt / warm:.1f} tokens/s")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
