"""`python -m duomo.bench.memory CHECKPOINT`: what of a quantized model is in memory, step by step.

Loads a multimodal checkpoint (a `duomo synth` one will do), runs text, then a picture, lets the idle pools go
and sets a cap; after each it prints the resident memory of the process and of each pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from duomo.checkpoints import load_model
from duomo.checkpoints.residency import Residency, residency_of
from duomo.processing.prompt import Grid, MediaSpan

SEED = 20261124
GRID = Grid(1, 16, 16)  # a picture of 64 tokens


def resident_bytes() -> int:
    """Of this process, as Linux counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("this system does not tell the resident memory")


def line(after: str, residency: Residency) -> str:
    pools = {name: pool["resident_bytes"] >> 20 for name, pool in residency.report().items()}
    held = ", ".join(f"{name} {size}" for name, size in pools.items())
    return f"{after}: {resident_bytes() >> 20} MiB; {held}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the text")
    parser.add_argument("--cap-gb", type=float, default=5.0, help="cap set at the end, in GB")
    options = parser.parse_args()
    model = load_model(options.checkpoint)
    residency = residency_of(model)
    if residency is None or not model.config.is_multimodal:
        parser.error("give a quantized multimodal checkpoint, such as `duomo synth` writes")
    ids, generator = model.config.ids, torch.Generator().manual_seed(SEED)
    print(line("loaded", residency))
    text = torch.randint(3, ids.image_patch, (options.tokens,), generator=generator).tolist()
    model.logits(text)
    print(line(f"after {options.tokens} text tokens", residency))
    residency.expect_picture()
    prompt = [ids.bos, ids.image_start, *[ids.image_patch] * GRID.num_tokens, ids.image_end]
    patches = torch.randn((GRID.num_patches, 588), generator=generator)
    model.logits(prompt, [MediaSpan(2, GRID)], patches)
    print(line(f"after a picture of {GRID.num_tokens} tokens", residency))
    residency.let_go_idle(0.0)
    print(line("idle pools let go", residency))
    residency.enforce_cap(int(options.cap_gb * 1e9))
    print(line(f"cap of {options.cap_gb:g} GB", residency))
    model.logits(text)
    residency.enforce_cap(int(options.cap_gb * 1e9))
    print(line("the text again, under the cap", residency))


if __name__ == "__main__":
    main()
