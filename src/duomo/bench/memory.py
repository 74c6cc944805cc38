"""`python -m duomo.bench.memory CHECKPOINT`: what of a quantized model is in memory, step by step.

Opens a multimodal checkpoint (a `duomo synth` one will do) as `duomo ask` does, answers a question that
fills the context, then one about a picture, then touches every page that any picture could need, and lets
the idle pools go. After each step: the resident memory of the process, and of each pool. The process's own
memory, pages of keys and values included, is all that is not in a pool.
"""

from __future__ import annotations

import argparse
import json
import platform
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from duomo.checkpoints.pages import bring_in
from duomo.engine.request import SamplingParams
from duomo.llm import LLM
from duomo.processing.messages import ImagePart, Message

SEED = 20261124
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, thinking="off")


def resident_bytes() -> dict[str, int]:
    """Of this process, as Linux counts it: all, the most so far, written memory, pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"all": "VmRSS", "peak": "VmHWM", "written": "RssAnon", "files": "RssFile"}
    return {name: int(fields[field].split()[0]) << 10 for name, field in names.items()}


def random_ids(llm: LLM, count: int, seed: int = SEED) -> list[int]:
    """Plain text tokens drawn at random: with random weights, as even a load as there is."""
    assert llm.config is not None
    low, high = 3, min(llm.config.ids.image_patch, llm.config.vocab_size) - 16
    return [int(token) for token in np.random.default_rng(seed).integers(low, high, count)]


def noise_picture(side_px: int, seed: int = SEED) -> ImagePart:
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return ImagePart(stream.getvalue())


def snapshot(llm: LLM, after: str) -> dict[str, Any]:
    assert llm.residency is not None
    pools = {name: int(row["resident_bytes"] or 0) for name, row in llm.residency.report().items()}
    resident = resident_bytes()
    total = resident["all"]
    found = {
        "after": after,
        "process_bytes": total,
        "own_bytes": total - sum(pools.values()),
        "resident_bytes": resident,
        "pools": pools,
    }
    held = ", ".join(f"{name} {size >> 20}" for name, size in pools.items())
    parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in resident.items())
    print(f"{after}: {total / 1e9:.2f} GB ({parts}); MiB of it: {held}", flush=True)
    return found


def run(checkpoint: Path, context: int, side_px: int, kv_dtype: str = "auto") -> dict[str, Any]:
    steps = []
    with LLM.open(checkpoint, max_model_tokens=4096, max_sequences=1, kv_dtype=kv_dtype) as llm:
        if llm.residency is None or not llm.has_vision:
            raise SystemExit("give a quantized multimodal checkpoint, such as `duomo synth` writes")
        steps.append(snapshot(llm, "opening"))
        llm.generate(random_ids(llm, context - 16), GREEDY)
        steps.append(snapshot(llm, f"{context:,} tokens of text"))
        answer = llm.chat([Message.of("user", noise_picture(side_px), "What is this?")], GREEDY)
        steps.append(snapshot(llm, f"a picture of {answer.usage.image_tokens} tokens"))
        pools = llm.residency.pools
        llm.residency.expect_picture()
        bring_in([item for pool in pools.values() for item in pool.ranges])
        llm.engine.runner.cache.touch()  # type: ignore[union-attr]
        steps.append(snapshot(llm, "touching every page of weights and of keys and values"))
        llm.residency.let_go_idle(0.0)
        steps.append(snapshot(llm, "letting idle pools go: the most that text can take"))
    return {
        "checkpoint": checkpoint.name,
        "machine": platform.processor() or platform.machine(),
        "kv_dtype": kv_dtype,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--context", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--side", type=int, default=448, help="side of the picture in pixels")
    parser.add_argument("--kv", default="auto", help="how keys and values are kept: auto, bfloat16, int8")
    parser.add_argument("--json", type=Path, help="file for the raw values")
    options = parser.parse_args()
    found = run(options.checkpoint, options.context, options.side, options.kv)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
