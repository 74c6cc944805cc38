"""`duomo merge`: an adapter folded into its base, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    base: Annotated[Path, typer.Argument(help="folder of a checkpoint, plain or 2-bit")],
    adapter: Annotated[Path, typer.Argument(help="folder of an adapter, ours or PEFT's")],
    target: Annotated[Path, typer.Argument(help="new folder for the merged checkpoint")],
    max_shard: Annotated[str, typer.Option(help="bytes of a file, as 5G")] = "5G",
) -> None:
    """Writes a plain checkpoint whose weights are base + adapter; memory is that of one file."""
    from duomo.checkpoints.fit import parse_bytes
    from duomo.train.merging import write_checkpoint

    files = write_checkpoint(base, target, adapter, max_shard_bytes=parse_bytes(max_shard))
    print(f"{target}: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
