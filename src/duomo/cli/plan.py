"""`duomo plan`: what of a checkpoint fits a machine, or what a recipe would train, before it is done."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from duomo.checkpoints.fit import Fit
    from duomo.checkpoints.inventory import Inventory


def plan(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with config.json and .safetensors files, or a RECIPE.yaml.")
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 typer reads this at run time, on Python 3.10 too
        typer.Argument(help="key=value, over a recipe"),
    ] = None,
    ram: Annotated[str, typer.Option(help="Memory that duomo may use, as 16G.")] = "16G",
    disk: Annotated[
        bool, typer.Option("--disk", help="Let experts that do not fit be read from disk; measures the disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what stays in memory, what a token reads, and the bound that memory's speed puts on decoding."""
    if checkpoint.suffix in (".yaml", ".yml"):
        _plan_recipe(checkpoint, overrides or [])
        return
    from duomo.checkpoints.bandwidth import disk_bytes_per_s, memory_bytes_per_s
    from duomo.checkpoints.files import weight_files
    from duomo.checkpoints.fit import fit, parse_bytes
    from duomo.checkpoints.inventory import take_inventory
    from duomo.errors import CheckpointError

    ram_bytes = parse_bytes(ram)
    inventory = take_inventory(checkpoint)
    result = fit(inventory, ram_bytes)
    if not result.holds_text and not disk:
        raise CheckpointError(
            f"{result.missing_bytes / 1e9:.2f} GB too little: text alone needs "
            f"{(ram_bytes + result.missing_bytes) / 1e9:.2f} GB; give more --ram, or --disk",
            needed=ram_bytes + result.missing_bytes,
            available=ram_bytes,
        )
    memory_speed = memory_bytes_per_s()
    disk_speed = disk_bytes_per_s(weight_files(checkpoint)[0]) if disk else None
    facts = _facts(inventory, result, memory_speed, disk_speed)
    print(json_module.dumps(facts, indent=2)) if json else _show(facts)


def _plan_recipe(recipe: Path, overrides: list[str]) -> None:
    from duomo.train.planning import plan_lines, plan_recipe
    from duomo.train.settings import read_settings

    reading = read_settings(recipe, overrides)
    for warning in reading.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for line in plan_lines(plan_recipe(reading.settings)):
        print(line)


def _facts(
    inventory: Inventory, result: Fit, memory_speed: float, disk_speed: float | None
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "synthetic": inventory.is_synthetic,
        "ram_bytes": result.ram_bytes,
        "resident_bytes": {"text": result.text_bytes, "pictures, when one arrives": result.vision_bytes},
        "holds_everything": result.holds_everything,
        "kv_bytes_per_token": result.kv_bytes_per_token,
        "read_bytes_per_token": {**result.read_per_token, "total": result.read_bytes},
        "memory_bytes_per_s": round(memory_speed),
        "decode_bound_tokens_per_s": round(result.decode_bound(memory_speed), 1),
        "longest_context_tokens": result.longest_context_tokens,
        "largest_picture_tokens": result.largest_picture_tokens,
    }
    if disk_speed is not None:
        seconds = result.disk_per_token / disk_speed + result.read_bytes / memory_speed
        facts["disk_bytes_per_s"] = round(disk_speed)
        facts["disk_bytes_per_token"] = round(result.disk_per_token)
        facts["decode_bound_with_disk_tokens_per_s"] = round(1 / seconds, 1)
    return facts


def _show(facts: dict[str, Any]) -> None:
    def gigabytes(count: float) -> str:
        return f"{count / 1e9:.3f} GB"

    if facts["synthetic"]:
        print("Synthetic: random weights; sizes and bounds are those of a real one.")
    print(f"of {gigabytes(facts['ram_bytes'])} of memory:")
    for what, count in facts["resident_bytes"].items():
        print(f"  weights for {what:28s} {gigabytes(count):>12s}")
    if not facts["holds_everything"]:
        print("  text and pictures do not fit together: pools are let go when their turn is over")
    print(f"  longest context {facts['longest_context_tokens']:>24,} tokens of text")
    print(f"  largest picture {facts['largest_picture_tokens']:>24,} tokens, beside 4,096 of text")
    print("a token of text reads:")
    for part, count in facts["read_bytes_per_token"].items():
        print(f"  {part:40s} {gigabytes(count):>12s}")
    speed, bound = facts["memory_bytes_per_s"], facts["decode_bound_tokens_per_s"]
    print(f"memory reads {gigabytes(speed)}/s now, so one stream decodes at most {bound} tokens/s")
    if "disk_bytes_per_s" in facts:
        per_token, slower = facts["disk_bytes_per_token"], facts["decode_bound_with_disk_tokens_per_s"]
        print(
            f"disk reads {gigabytes(facts['disk_bytes_per_s'])}/s; evenly chosen experts cost "
            f"{gigabytes(per_token)} of it a token: at most {slower} tokens/s"
        )
