"""`duomo plan`: what of a checkpoint fits a machine, or what a recipe would train, before it is done."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Optional

import typer


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
    gpu: Annotated[
        Optional[str],  # noqa: UP045 typer reads this at run time, on Python 3.10 too
        typer.Option(help="Memory of a GPU, as 24G: which parts it would hold."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what stays in memory, what a token reads, and the bound that memory's speed puts on decoding."""
    if checkpoint.suffix in (".yaml", ".yml"):
        _plan_recipe(checkpoint, overrides or [])
        return
    from duomo.checkpoints.fit import fit, parse_bytes
    from duomo.checkpoints.forecast import forecast, lines
    from duomo.checkpoints.inventory import take_inventory
    from duomo.errors import CheckpointError

    ram_bytes, gpu_bytes = parse_bytes(ram), parse_bytes(gpu) if gpu else None
    result = fit(take_inventory(checkpoint), ram_bytes)
    if not result.holds_text and not disk:
        raise CheckpointError(
            f"{result.missing_bytes / 1e9:.2f} GB too little: text alone needs "
            f"{(ram_bytes + result.missing_bytes) / 1e9:.2f} GB; give more --ram, or --disk",
            needed=ram_bytes + result.missing_bytes,
            available=ram_bytes,
        )
    facts = forecast(checkpoint, ram_bytes, disk, gpu_bytes)
    print(json_module.dumps(facts, indent=2) if json else "\n".join(lines(facts)))


def _plan_recipe(recipe: Path, overrides: list[str]) -> None:
    from duomo.train.planning import plan_lines, plan_recipe
    from duomo.train.settings import read_settings

    reading = read_settings(recipe, overrides)
    for warning in reading.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for line in plan_lines(plan_recipe(reading.settings)):
        print(line)
