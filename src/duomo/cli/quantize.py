"""`duomo quantize`: a checkpoint to 2 bits a weight, or as few as a budget allows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Optional

import typer

from duomo.errors import CheckpointError, ConfigError


def quantize(
    source: Annotated[Path, typer.Argument(help="Folder of a PT, Paddle or native checkpoint.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; an unfinished run in it goes on.")],
    bits: Annotated[str, typer.Option(help="The bit plan: 2, 2.3, 4 or auto.")] = "2",
    calibration: Annotated[
        Optional[Path],  # noqa: UP045 typer reads this at run time, on Python 3.10 too
        typer.Option(help="Text, JSON lines or a folder with pictures; without it, plain rounding."),
    ] = None,
    budget: Annotated[str, typer.Option(help="Bytes that `--bits auto` may spend, as 9G.")] = "",
    memory: Annotated[str, typer.Option(help="Refuse to start where one layer needs more, as 16G.")] = "",
    code: Annotated[str, typer.Option(help="The 2-bit code: lcc2-10, lcc2-12 or lcc2-14.")] = "lcc2-12",
    embeddings: Annotated[int, typer.Option(help="Bits of embeddings and head: 8 or 6.")] = 8,
    attention: Annotated[int, typer.Option(help="Bits of attention: 4 or 8.")] = 4,
    tune: Annotated[
        bool, typer.Option(help="Tune each layer's scales and norms; needs calibration.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of the encoder; 0 takes all cores.")] = 0,
) -> None:
    """Bring a checkpoint to 2 bits a weight, with a report; stoppable and resumable."""
    import os
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from duomo.checkpoints import load_config
    from duomo.checkpoints.stream import is_quantized
    from duomo.processing.tokenizer import Tokenizer
    from duomo.quant import build_plan
    from duomo.quant.memory import check_memory
    from duomo.quant.pipeline import Progress as Step
    from duomo.quant.pipeline import quantize as run
    from duomo.quant.prompts import read_prompts
    from duomo.trellis.code import preset

    budget_bytes = _bytes(budget) if budget else 0
    memory_bytes = _bytes(memory) if memory else 0
    config = load_config(source)
    if is_quantized(source):
        raise CheckpointError(f"{source} is quantized already; give the checkpoint it was made from")
    plan = build_plan(bits, config, preset(code), embeddings, attention)
    prompts = read_prompts(calibration, Tokenizer.load(source), config) if calibration else []
    if memory:
        check_memory(config, sum(len(prompt.ids) for prompt in prompts), memory_bytes)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True))
    task = bar.add_task("quantizing", total=None, left="")

    def show(step: Step) -> None:
        bar.start()  # not before the input was found good: a refusal is one line alone
        left = _left(step.seconds_left)
        bar.update(task, description=step.what, completed=step.done, total=step.total, left=left)

    try:
        report = run(
            source,
            target,
            plan,
            prompts,
            budget_bytes,
            num_threads=threads if threads else len(os.sched_getaffinity(0)),
            progress=show,
            is_tuned=tune,
        )
    except KeyboardInterrupt:
        bar.stop()
        print(
            "duomo: stopped; the same command goes on after the last whole layer", file=sys.stderr, flush=True
        )
        os._exit(130)  # the encoder's threads need not be waited for: what they do counts for nothing yet
    finally:
        if bar.live.is_started:  # or it would print an empty line
            bar.stop()
    everything = report["parts"]["everything"]
    print(f"{target}: {report['file_bytes']:,} bytes, {everything['bits']:.3f} bits a weight; see report.md")


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{minutes} min left" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min left"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise ConfigError(f"{text!r} is no number of bytes; write it as 900M or 8.6G")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))
