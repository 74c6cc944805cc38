"""From what fits to what is set: how much memory keys and values get, how many requests run together, and
whether experts are read from disk.

Whoever opens a model passes what a person asked for; what nobody asked for is chosen here from the memory
there is. What cannot work is refused before anything is loaded, in one line with the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from duomo.checkpoints.fit import PROCESS_BYTES, USUAL_CONTEXT, Fit, fit
from duomo.checkpoints.inventory import Inventory
from duomo.checkpoints.pressure import available_bytes
from duomo.errors import CheckpointError

MOST_SEQUENCES = 64
_TOKENS_EACH = 1024  # pages for so many tokens are there for every request that runs


@dataclass(frozen=True, slots=True)
class Settings:
    """`weights_cap_bytes` None: every weight may be in memory."""

    ram_bytes: int
    kv_bytes: int
    max_sequences: int
    weights_cap_bytes: int | None


def settle(
    inventory: Inventory,
    ram_bytes: int | None = None,
    kv_bytes: int | None = None,
    max_sequences: int | None = None,
) -> Settings:
    """`ram_bytes` None: what the machine has available. CheckpointError where the model cannot run in it.

    A model too large for a `ram_bytes` that was asked for reads experts from disk; nobody gets that unasked.
    """
    found = available_bytes()
    ram = ram_bytes or (found[0] if found else 16 * 10**9)
    result = fit(inventory, ram)
    usual = min(USUAL_CONTEXT, inventory.config.max_positions) * result.kv_bytes_per_token
    kv = kv_bytes or _kv_bytes(result, usual)
    sequences = max_sequences or max(1, min(MOST_SEQUENCES, kv // (_TOKENS_EACH * result.kv_bytes_per_token)))
    cap = ram - PROCESS_BYTES - (kv_bytes or usual)
    if result.text_bytes <= cap:
        needs_cap = ram_bytes is not None and result.text_bytes + result.vision_bytes > cap
        can_cap = inventory.layout == "quantized" and bool(inventory.num_bytes("text experts"))
        return Settings(ram, kv, sequences, cap if needs_cap and can_cap else None)
    _refuse_if_too_small(inventory, result, cap, is_asked=ram_bytes is not None)
    return Settings(ram, kv_bytes or usual, sequences, cap)


def _kv_bytes(result: Fit, usual: int) -> int:
    """Usual contexts for as many requests as run together, as far as memory goes beside all weights."""
    free = result.ram_bytes - PROCESS_BYTES - result.text_bytes - result.vision_bytes
    return max(usual, min(MOST_SEQUENCES * usual, free, result.ram_bytes // 4))


def _refuse_if_too_small(inventory: Inventory, result: Fit, cap: int, is_asked: bool) -> None:
    needed = result.ram_bytes - cap + result.text_bytes
    least = needed - _spare_bytes(inventory)
    numbers = {"needed": needed, "available": result.ram_bytes}
    said = f"text alone needs {needed / 1e9:.1f} GB of memory; {result.ram_bytes / 1e9:.1f} GB are"
    if inventory.layout != "quantized" or not inventory.num_bytes("text experts"):
        raise CheckpointError(f"{said} {'allowed' if is_asked else 'available'}: give more", **numbers)
    if not is_asked:
        raise CheckpointError(
            f"{said} available: --ram says how much to use, from {least / 1e9:.1f}G on, and reads the rest "
            "from disk",
            **numbers,
        )
    if result.ram_bytes < least:
        raise CheckpointError(
            f"{said} allowed, and less than {least / 1e9:.1f} GB does not hold what every token reads",
            **numbers,
        )


def _spare_bytes(inventory: Inventory) -> int:
    """Of text experts that may lie on disk: all but twice what one token chooses."""
    config = inventory.config
    if config.text_experts is None:
        return 0
    chosen = min(1.0, 2 * config.num_chosen / config.text_experts.num_experts)
    return int((1 - chosen) * inventory.num_bytes("text experts"))
