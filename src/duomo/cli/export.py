"""`duomo export`: a run, an adapter or a checkpoint as a plain checkpoint in files of a chosen size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def export(
    source: Annotated[Path, typer.Argument(help="folder of a run, an adapter or a checkpoint")],
    target: Annotated[Path, typer.Argument(help="new folder")],
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="bfloat16 or float32; as stored if not said"),
    ] = None,
    max_shard: Annotated[str, typer.Option(help="bytes of a file, as 5G")] = "5G",
) -> None:
    """Reads any layout (PT, Paddle, transformers' own, 2-bit) and writes the PT layout, shard by shard."""
    import torch

    from duomo.checkpoints.fit import parse_bytes
    from duomo.errors import ConfigError
    from duomo.train.merging import sources_of, write_checkpoint

    dtypes = {None: None, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ConfigError(f"dtype is {dtype!r}; it must be bfloat16 or float32")
    checkpoint, adapter = sources_of(source)
    files = write_checkpoint(checkpoint, target, adapter, dtypes[dtype], parse_bytes(max_shard))
    print(f"{target}: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
