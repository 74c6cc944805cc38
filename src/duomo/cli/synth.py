"""`duomo synth`: a full-size quantized checkpoint with random weights, to try a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not hold weights yet.")],
    preset: Annotated[str, typer.Option(help="A model of the family, as vl-28b-a3b.")] = "vl-28b-a3b",
    bits: Annotated[str, typer.Option(help="The bit plan: 2, 2.3 or 4.")] = "2",
    embeddings: Annotated[int, typer.Option(help="Bits of embeddings and head: 8 or 6.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random codes.")] = 0,
    skew: Annotated[
        float,
        typer.Option(help="Popularity of an expert falls as rank^-SKEW: 0 even, 0.65 as in trained models."),
    ] = 0.0,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045 typer reads this at run time, on Python 3.10 too
        typer.Option(
            help="Folder of a checkpoint whose tokenizer files are copied; without it ids read as numbers."
        ),
    ] = None,
) -> None:
    """Write a quantized checkpoint with random weights; it is marked synthetic and answers nonsense."""
    from rich.console import Console
    from rich.progress import Progress

    from duomo.model import preset as find_preset
    from duomo.quant import build_plan
    from duomo.quant.synth import synthesize

    config = find_preset(preset)
    plan = build_plan(bits, config, embedding_bits=embeddings)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{config.name}, {bits} bits", total=None)
        num_bytes = synthesize(
            config,
            out,
            plan,
            seed,
            skew,
            tokenizer,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{out}: {num_bytes:,} bytes of random weights ({config.name}, {bits} bits)")
