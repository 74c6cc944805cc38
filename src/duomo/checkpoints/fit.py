"""What of a model fits into a machine's memory, and what that bounds: arithmetic on an inventory.

Bytes a token reads bound decoding: one stream can be no faster than bandwidth over bytes. Weights are taken
as they lie on disk, which is how quantized ones are used; the cache of keys and values is bfloat16.
It promises nothing about speed beyond the bound, and counts no other program on the machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from duomo.checkpoints.inventory import VISION_PARTS, Inventory
from duomo.errors import ConfigError

PROCESS_BYTES = 600 << 20
"""Kept for the interpreter, torch and buffers. Importing torch and the model and multiplying once leaves
299 MiB resident (Linux, torch 2.13, ru_maxrss); the rest is room for activations."""
USUAL_CONTEXT = 4096  # tokens kept free for the text when the largest picture is asked for
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True, slots=True)
class Fit:
    """All sizes in bytes. `missing_bytes` of routed experts must be read from disk when they are chosen."""

    ram_bytes: int
    text_bytes: int
    vision_bytes: int
    kv_bytes_per_token: int
    read_per_token: dict[str, int]
    longest_context_tokens: int
    largest_picture_tokens: int
    missing_bytes: int
    disk_per_token: float

    @property
    def holds_text(self) -> bool:
        """Whether text alone runs with every weight it needs in memory."""
        return self.missing_bytes == 0

    @property
    def holds_everything(self) -> bool:
        needed = self.text_bytes + self.vision_bytes + PROCESS_BYTES
        return needed + USUAL_CONTEXT * self.kv_bytes_per_token <= self.ram_bytes

    @property
    def read_bytes(self) -> int:
        return sum(self.read_per_token.values())

    def decode_bound(self, bytes_per_s: float) -> float:
        """Tokens/s that one stream of text cannot exceed."""
        return bytes_per_s / self.read_bytes


def parse_bytes(text: str) -> int:
    """`16G`, `512M`, `2.5Gi` -> bytes. ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write it as 16G, 512M or 2.5Gi")
    return int(float(match[1]) * _UNITS[match[2]])


def fit(inventory: Inventory, ram_bytes: int) -> Fit:
    """What `ram_bytes` of memory allow. Pure arithmetic; see `bandwidth` for the figures to divide by."""
    config = inventory.config
    vision_bytes = inventory.num_bytes(*VISION_PARTS)
    text_bytes = inventory.total.num_bytes - vision_bytes
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    read = read_per_token(inventory)
    free = ram_bytes - PROCESS_BYTES - text_bytes
    missing = max(0, USUAL_CONTEXT * kv_bytes - free)
    routed = inventory.num_bytes("text experts")
    share = min(1.0, missing / routed) if routed else 0.0
    return Fit(
        ram_bytes=ram_bytes,
        text_bytes=text_bytes,
        vision_bytes=vision_bytes,
        kv_bytes_per_token=kv_bytes,
        read_per_token=read,
        longest_context_tokens=max(0, min(config.max_positions, free // kv_bytes)),
        largest_picture_tokens=_largest_picture(inventory, free - vision_bytes, kv_bytes),
        missing_bytes=missing,
        disk_per_token=share * read.get("text experts", 0),
    )


@dataclass(frozen=True, slots=True)
class GpuFit:
    """Bytes by part that a GPU would hold, what stays in the machine's memory, the context beside them."""

    held: dict[str, int]
    left_bytes: int
    longest_context_tokens: int
    read_bytes: int  # of what is held, for one token of text


def fit_gpu(inventory: Inventory, gpu_bytes: int) -> GpuFit:
    """Parts in order of how much of them a token reads; experts in part where they do not fit whole.

    Pages for a usual context come first. Parts that only pictures read come last.
    """
    config = inventory.config
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    free = gpu_bytes - PROCESS_BYTES - min(USUAL_CONTEXT, config.max_positions) * kv_bytes
    read = read_per_token(inventory)
    if "head" not in inventory.parts and "head" in read:
        read["embeddings"] = read.pop("head")
    held, read_bytes, left = {}, 0.0, 0
    ordered = sorted(inventory.parts, key=lambda part: -read.get(part, 0) / inventory.parts[part].num_bytes)
    for part in ordered:
        size = inventory.parts[part].num_bytes
        taken = size if size <= free else max(0, free) if part in ("text experts", "vision experts") else 0
        if taken:
            held[part] = taken
        free -= taken
        left += size - taken
        read_bytes += read.get(part, 0) * taken / size
    tokens = min(USUAL_CONTEXT, config.max_positions) + max(0, free) // kv_bytes
    return GpuFit(held, left, max(0, min(tokens, config.max_positions)), max(1, round(read_bytes)))


def read_per_token(inventory: Inventory) -> dict[str, int]:
    """Bytes of weights that decoding one token of text reads, by part (an embedding is one row)."""
    config = inventory.config
    head = inventory.num_bytes("head") or inventory.num_bytes("embeddings")
    read = {"head": head}
    for part in ("attention", "shared experts", "dense MLP", "norms"):
        read[part] = inventory.num_bytes(part)
    if config.text_experts:
        banks = 2 if config.vision_experts else 1
        read["routers"] = inventory.num_bytes("routers") // banks
        routed = inventory.num_bytes("text experts")
        read["text experts"] = routed * config.num_chosen // config.text_experts.num_experts
    return {part: count for part, count in read.items() if count}


def _largest_picture(inventory: Inventory, free: int, kv_bytes: int) -> int:
    """Tokens of the largest picture beside USUAL_CONTEXT of text: the tower works in float32."""
    vision, config = inventory.config.vision, inventory.config
    if vision is None:
        return 0
    free -= USUAL_CONTEXT * kv_bytes
    per_patch = 4 * (6 * vision.hidden_size + 2 * vision.intermediate_size)
    patches = vision.spatial_merge**2
    most = free // (patches * per_patch + kv_bytes)
    return max(0, min(most, config.max_positions - USUAL_CONTEXT))
