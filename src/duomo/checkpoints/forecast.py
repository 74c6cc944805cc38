"""What `duomo plan` says, and `duomo serve` at start: what will be in memory, how fast at most, how long.

Figures of `fit` beside this machine's own bandwidth, as one JSON object or as lines for people.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duomo.checkpoints.bandwidth import disk_bytes_per_s, gpu_bytes_per_s, memory_bytes_per_s
from duomo.checkpoints.files import weight_files
from duomo.checkpoints.fit import Fit, fit, fit_gpu
from duomo.checkpoints.inventory import Inventory, take_inventory

Facts = dict[str, Any]


def forecast(
    checkpoint: Path, ram_bytes: int, measures_disk: bool = False, gpu_bytes: int | None = None
) -> Facts:
    """All of it, measured now, in about a second. Errors are those of `take_inventory`."""
    inventory = take_inventory(checkpoint)
    result = fit(inventory, ram_bytes)
    memory_speed = memory_bytes_per_s()
    facts = _facts(inventory, result, memory_speed)
    if measures_disk:
        disk_speed = disk_bytes_per_s(weight_files(checkpoint)[0])
        seconds = result.disk_per_token / disk_speed + result.read_bytes / memory_speed
        facts["disk_bytes_per_s"] = round(disk_speed)
        facts["disk_bytes_per_token"] = round(result.disk_per_token)
        facts["decode_bound_with_disk_tokens_per_s"] = round(1 / seconds, 1)
    if gpu_bytes is not None:
        facts["gpu"] = _gpu_facts(inventory, gpu_bytes)
    return facts


def lines(facts: Facts) -> Iterator[str]:
    """For people."""
    if facts["synthetic"]:
        yield "Synthetic: random weights; sizes and bounds are those of a real one."
    yield f"of {_gigabytes(facts['ram_bytes'])} of memory:"
    for what, count in facts["resident_bytes"].items():
        yield f"  weights for {what:28s} {_gigabytes(count):>12s}"
    if facts["missing_bytes"]:
        yield f"  read from disk when chosen               {_gigabytes(facts['missing_bytes']):>12s}"
    elif not facts["holds_everything"]:
        yield "  text and pictures do not fit together: pools are let go when their turn is over"
    yield f"  longest context {facts['longest_context_tokens']:>24,} tokens of text"
    yield f"  largest picture {facts['largest_picture_tokens']:>24,} tokens, beside 4,096 of text"
    yield "a token of text reads:"
    for part, count in facts["read_bytes_per_token"].items():
        yield f"  {part:40s} {_gigabytes(count):>12s}"
    speed, bound = facts["memory_bytes_per_s"], facts["decode_bound_tokens_per_s"]
    yield f"memory reads {_gigabytes(speed)}/s now, so one stream decodes at most {bound} tokens/s"
    if "disk_bytes_per_s" in facts:
        per_token, slower = facts["disk_bytes_per_token"], facts["decode_bound_with_disk_tokens_per_s"]
        yield (
            f"disk reads {_gigabytes(facts['disk_bytes_per_s'])}/s; evenly chosen experts cost "
            f"{_gigabytes(per_token)} of it a token: at most {slower} tokens/s"
        )
    if "gpu" in facts:
        yield from _gpu_lines(facts["gpu"])


def _facts(inventory: Inventory, result: Fit, memory_speed: float) -> Facts:
    return {
        "synthetic": inventory.is_synthetic,
        "ram_bytes": result.ram_bytes,
        "resident_bytes": {"text": result.text_bytes, "pictures, when one arrives": result.vision_bytes},
        "missing_bytes": result.missing_bytes,
        "holds_everything": result.holds_everything,
        "kv_bytes_per_token": result.kv_bytes_per_token,
        "read_bytes_per_token": {**result.read_per_token, "total": result.read_bytes},
        "memory_bytes_per_s": round(memory_speed),
        "decode_bound_tokens_per_s": round(result.decode_bound(memory_speed), 1),
        "longest_context_tokens": result.longest_context_tokens,
        "largest_picture_tokens": result.largest_picture_tokens,
    }


def _gpu_facts(inventory: Inventory, gpu_bytes: int) -> Facts:
    """Bounds only where a GPU is there to be measured."""
    held = fit_gpu(inventory, gpu_bytes)
    speed = gpu_bytes_per_s()
    facts: Facts = {
        "gpu_bytes": gpu_bytes,
        "held_bytes": held.held,
        "left_in_memory_bytes": held.left_bytes,
        "longest_context_tokens": held.longest_context_tokens,
        "gpu_bytes_per_s": None if speed is None else round(speed),
    }
    if speed is not None:
        facts["decode_bound_tokens_per_s"] = round(speed / held.read_bytes, 1)
    return facts


def _gpu_lines(gpu: Facts) -> Iterator[str]:
    yield f"of {_gigabytes(gpu['gpu_bytes'])} of GPU memory, what a token reads most densely first:"
    for part, count in gpu["held_bytes"].items():
        yield f"  {part:40s} {_gigabytes(count):>12s}"
    if gpu["left_in_memory_bytes"]:
        yield f"  stays in the machine's memory            {_gigabytes(gpu['left_in_memory_bytes']):>12s}"
    yield f"  longest context {gpu['longest_context_tokens']:>24,} tokens of text"
    if gpu["gpu_bytes_per_s"] is None:
        yield "no GPU is here to measure, so its decode bound is not said"
    else:
        bound = gpu["decode_bound_tokens_per_s"]
        speed = _gigabytes(gpu["gpu_bytes_per_s"])
        yield f"it reads {speed}/s, so what it holds decodes at most {bound} tokens/s"
    yield "quantized weights run on the CPU in this version; this is what a GPU could hold"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB"
