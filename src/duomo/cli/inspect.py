"""`duomo inspect`: what a checkpoint holds, part by part. Headers are read, weights are not."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from duomo.errors import CheckpointError

if TYPE_CHECKING:
    from duomo.checkpoints.inventory import Inventory


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and .safetensors files.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read a quantized checkpoint whole and compare its checksums.")
    ] = False,
) -> None:
    """Show a checkpoint's layout, sizes, parameters, bytes and bits per weight by part."""
    from duomo.checkpoints.inventory import take_inventory
    from duomo.checkpoints.quantized import read_quantized

    inventory = take_inventory(checkpoint)
    if verify:
        if inventory.layout != "quantized":
            raise CheckpointError(
                f"{checkpoint} is not quantized, so it has no checksums; leave out --verify"
            )
        for _ in read_quantized(checkpoint):
            pass
    if json:
        print(json_module.dumps(facts(inventory), indent=2))
    else:
        _show(inventory, str(checkpoint))


def facts(inventory: Inventory) -> dict[str, Any]:
    """The same as the table, for programs."""
    config = inventory.config
    rows = {**inventory.parts, "total": inventory.total}
    return {
        "layout": inventory.layout,
        "synthetic": inventory.is_synthetic,
        "tensors": inventory.num_tensors,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "multimodal": config.is_multimodal,
        "parts": {
            part: {
                "parameters": size.parameters,
                "bytes": size.num_bytes,
                "bits_per_weight": round(size.bits_per_weight, 4),
            }
            for part, size in rows.items()
        },
    }


def _show(inventory: Inventory, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    config = inventory.config
    console = Console()
    kind = "text and vision" if config.is_multimodal else "text"
    console.print(
        f"{title}: {inventory.layout} layout, {inventory.num_tensors:,} tensors; {kind}, "
        f"{config.num_layers} layers of {config.hidden_size}, vocabulary {config.vocab_size:,}",
        markup=False,
        highlight=False,
        soft_wrap=True,  # a path is never broken in two
    )
    if inventory.is_synthetic:
        console.print("Synthetic: random weights, to try a machine; its answers mean nothing.", style="bold")
    table = Table("part", box=None, pad_edge=False)
    for column in ("parameters", "bytes", "bits/weight"):
        table.add_column(column, justify="right")
    rows = [*inventory.parts.items(), ("total", inventory.total)]
    for part, size in rows:
        style = "bold" if part == "total" else None
        cells = f"{size.parameters:,}", f"{size.num_bytes:,}", f"{size.bits_per_weight:.3f}"
        table.add_row(part, *cells, style=style)
    console.print(table)
