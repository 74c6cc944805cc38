"""What people see of a run: a bar with loss, tokens/s and time left, metrics.jsonl, report.html, TensorBoard.

`metrics.jsonl` is the source of the others: a line every `report_every` steps. A resumed run drops lines of
steps it will do again, so the files are those of a run that was never stopped.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duomo.train.evaluate import Evaluation
from duomo.train.groups import group_of
from duomo.train.objectives import StepReport
from duomo.train.report import write_report
from duomo.train.routing import Usage
from duomo.train.settings import Settings, to_fields

if TYPE_CHECKING:
    from duomo.train.loop import Run

Say = Callable[[str], None]


class Progress:
    """Gathers steps into lines. `say` given, lines go there and no bar is drawn."""

    def __init__(self, settings: Settings, say: Say | None) -> None:
        self.settings, self._say = settings, say
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self._bar: Any = None
        self._task: Any = None
        self._board: Any = None
        self._since: list[StepReport] = []
        self._began = self._first_step = 0.0
        self._num_steps = 0
        self._judged: Evaluation | None = None
        self._tokens = 0

    def say(self, line: str) -> None:
        if self._say:
            self._say(line)
        elif self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr)

    def start(self, run: Run) -> None:
        settings, self._num_steps = self.settings, run.num_steps
        self._first_step, self._began = run.first_step, time.monotonic()
        self._mark = self._began
        self._file = settings.folder / "metrics.jsonl"
        self.rows = [row for row in _read(self._file) if row["step"] <= run.first_step]
        _write(self._file, self.rows)
        trains = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        groups = sorted({group_of(n) for n, p in run.model.named_parameters() if p.requires_grad})
        self.facts = {
            "stage": settings.stage,
            "model": str(run.trained.folder.name),
            "trains": f"{trains:,} values in {', '.join(groups)}",
            "data": run.statistics.line(),
            "steps": run.num_steps,
            "recipe": to_fields(settings),
        }
        self.say(f"{settings.stage}: trains {self.facts['trains']}")
        self.say(self.facts["data"])
        for problem in run.samples.left_out:
            self.say(f"left out {problem.source}: {problem.message}")
        if run.first_step:
            self.say(f"goes on after step {run.first_step} of {run.num_steps}")
        self._board = _open_board(settings, self.say)
        if self._say is None and sys.stderr.isatty():
            self._open_bar(run.first_step)

    def note(
        self, done: int, report: StepReport, rate: float, usage: Usage, evaluation: Evaluation | None
    ) -> None:
        """One step; `evaluation` where one was just made."""
        self._since.append(report)
        self._judged = evaluation or self._judged
        self._tokens += report.num_tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=f"{report.loss:.4f}", speed=self._speed())
        if done % self.settings.report_every and done != self._num_steps:
            return
        row = self._row(done, rate, usage, self._judged)
        self._judged = None
        self.rows.append(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        write_report(self.settings.folder / "report.html", self.facts, self.rows, is_over=False)
        self._to_board(row)
        if self._bar is None:
            self.say(_line(row, self._num_steps))

    def finish(self, folder: Path) -> None:
        write_report(self.settings.folder / "report.html", self.facts, self.rows, is_over=True)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._board is not None:
            self._board.close()
        self.say(f"written to {folder}; the report is {self.settings.folder / 'report.html'}")

    def _row(self, done: int, rate: float, usage: Usage, evaluation: Evaluation | None) -> dict[str, Any]:
        steps, self._since = self._since, []
        count = len(steps)
        now = time.monotonic()
        span, self._mark = max(1e-9, now - self._mark), now
        judged = sum(step.num_judged for step in steps)
        pace = (now - self._began) / max(1, done - self._first_step)
        values = {}
        for name in sorted({name for step in steps for name in step.values}):
            told = [step.values[name] for step in steps if name in step.values]
            values[name] = sum(told) / len(told)
        row: dict[str, Any] = {
            "step": done,
            "loss": sum(step.loss for step in steps) / count,
            "accuracy": sum(step.num_right for step in steps) / judged if judged else None,
            "rate": rate,
            "tokens_per_s": sum(step.num_tokens for step in steps) / span,
            "seconds_left": pace * (self._num_steps - done),
            "supervised": sum(step.num_supervised for step in steps),
            "values": values,
            "usage": usage.take_shares(),
        }
        if evaluation is not None:
            row["evaluation"] = asdict(evaluation)
        return row

    def _speed(self) -> str:
        return f"{self._tokens / max(1e-9, time.monotonic() - self._began):,.0f}"

    def _open_bar(self, first_step: int) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn(self.settings.stage),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=self._num_steps, completed=first_step, loss="-", speed="-")
        self._bar.start()

    def _to_board(self, row: dict[str, Any]) -> None:
        if self._board is None:
            return
        scalars = {"loss": row["loss"], "rate": row["rate"], "tokens_per_s": row["tokens_per_s"]}
        scalars |= {} if row["accuracy"] is None else {"accuracy": row["accuracy"]}
        judged = dict(row.get("evaluation", {}))
        kinds = {kind: share for kind, (_, share) in judged.pop("by_kind", {}).items()}
        scalars |= {f"evaluation/{name}": value for name, value in (judged | kinds).items()} | row["values"]
        for name, value in scalars.items():
            self._board.add_scalar(name, value, row["step"])
        self._board.flush()


class Unseen:
    """The progress of every process but the first, which tells for all."""

    def say(self, line: str) -> None: ...

    def start(self, run: Run) -> None: ...

    def note(
        self, done: int, report: StepReport, rate: float, usage: Usage, evaluation: Evaluation | None
    ) -> None: ...

    def finish(self, folder: Path) -> None: ...


def _open_board(settings: Settings, say: Say) -> Any:
    if not settings.tensorboard:
        return None
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        say("no TensorBoard files: tensorboardX is not installed (duomo[train]); tensorboard=false is silent")
        return None
    return SummaryWriter(str(settings.folder / "tensorboard"))


def _line(row: dict[str, Any], num_steps: int) -> str:
    accuracy = "" if row["accuracy"] is None else f" right {100 * row['accuracy']:.1f} %"
    judged = ""
    if "evaluation" in row:
        found = row["evaluation"]
        judged = f"; unseen: loss {found['loss']:.4f}, answers {100 * found['answers_right']:.1f} %"
    return (
        f"step {row['step']}/{num_steps} loss {row['loss']:.4f}{accuracy} "
        f"{row['tokens_per_s']:,.0f} tokens/s, {row['seconds_left']:.0f} s left{judged}"
    )


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the line a kill cut off; its step is done again
            break
    return found


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)
