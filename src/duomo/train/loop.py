"""The run of a recipe: open, go on where it was stopped, step, report, save, write the result.

`train` is `duomo train RECIPE.yaml`; `duomo.finetune` is its Python face. The order of everything is a
function of the settings and the step, so a run that was killed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duomo.errors import TrainingError
from duomo.train.evaluate import Evaluation, evaluate
from duomo.train.finish import write_result
from duomo.train.grpo import Rollouts
from duomo.train.objectives import Answers, Objective, Preferences, StepReport
from duomo.train.optimiser import build_optimizer, rate_factor, set_rates
from duomo.train.packing import Budget, PackOrder, PackStatistics, statistics
from duomo.train.processes import Processes
from duomo.train.progress import Progress, Unseen
from duomo.train.routing import MODALITIES, RouterWatch, Usage, after_step, router_places
from duomo.train.samples import Samples
from duomo.train.settings import Settings, read_settings
from duomo.train.stages import Trained, open_trained
from duomo.train.state import read_state, restore, save_state

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Result:
    """Where the weights lie (a checkpoint, or an adapter), and the last figures."""

    folder: Path
    steps: int
    loss: float
    evaluation: Evaluation | None


def finetune(recipe: str | Path | Mapping[str, Any], *overrides: str, say: Say | None = None) -> Result:
    """Trains by a recipe: a YAML file or its mapping, then `key=value` overrides. Resumes what was begun.

    Raises TrainingError (the recipe or the data), CheckpointError (the model).
    """
    reading = read_settings(Path(recipe) if isinstance(recipe, str) else recipe, overrides)
    for warning in reading.warnings:
        (say or print)(f"warning: {warning}")
    return train(reading.settings, say)


def train(settings: Settings, say: Say | None = None) -> Result:
    """Runs or resumes, alone or as one of the processes of a run. Without `say`, progress goes to stderr."""
    processes = Processes.join(settings)
    progress = Progress(settings, say) if processes.rank == 0 else Unseen()
    trained = open_trained(settings, progress.say)
    run = Run(settings, trained, progress, processes)
    return run.go()


class Run:
    """One model, its data and its optimizer. Opening checks everything that can be wrong before a step."""

    def __init__(
        self, settings: Settings, trained: Trained, progress: Progress | Unseen, processes: Processes
    ) -> None:
        settings.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.settings, self.trained, self.progress, self.processes = settings, trained, progress, processes
        self.model = trained.model
        leave_out = settings.too_long == "leave_out"
        paths = [Path(file) for file in settings.data]
        self.samples = Samples(paths, trained.renderer, settings.max_tokens, leave_out)
        self.eval_samples = None
        if settings.eval_data:
            files = [Path(file) for file in settings.eval_data]
            self.eval_samples = Samples(files, trained.renderer, settings.max_tokens, leave_out)
        check_rows_fit(self.samples, settings)
        budget = Budget(settings.max_tokens, settings.max_patches)
        lengths = self.samples.tokens, self.samples.patches
        self.order = PackOrder(*lengths, budget, settings.packing, settings.seed)
        self.statistics: PackStatistics = statistics(
            self.order.epoch(0), *lengths, self.samples.supervised, budget
        )
        processes.place(self.model)
        self.optimizer = build_optimizer(self.model, settings)
        self.watch = RouterWatch().attach(self.model)
        self.usage = Usage(router_places(self.model))
        per_epoch = self.statistics.num_packs / settings.packs_per_step
        self.num_steps = settings.steps or max(1, math.ceil(settings.epochs * per_epoch))
        self.state_file = settings.folder / "state.pt"
        self.first_step = 0
        if self.state_file.is_file():
            fields = read_state(self.state_file, settings)
            self.first_step = restore(fields, self.model, self.optimizer, self.usage, processes)

    def go(self) -> Result:
        settings, progress = self.settings, self.progress
        progress.start(self)
        objective = self._objective()
        report, evaluation = StepReport(), None
        for step in range(self.first_step, self.num_steps):
            report = self.step(objective, step)
            done = step + 1
            is_last = done == self.num_steps
            fresh = None
            if settings.eval_every and self.eval_samples and (done % settings.eval_every == 0 or is_last):
                fresh = evaluation = evaluate(self.model, self.eval_samples, settings)
            progress.note(done, report, self.optimizer.param_groups[0]["lr"], self.usage, fresh)
            self.usage.clear()
            if done % settings.save_every == 0 or is_last:
                self.save(done)
        self.watch.detach()
        folder = write_result(settings, self.trained, self.processes)
        progress.finish(folder)
        return Result(folder, self.num_steps, report.loss, evaluation)

    def step(self, objective: Objective, step: int) -> StepReport:
        settings = self.settings
        factor = rate_factor(settings, step, self.num_steps)
        set_rates(self.optimizer, factor)
        first = step * settings.packs_per_step
        packs = [self.order[first + index] for index in range(settings.packs_per_step)]
        self.optimizer.zero_grad()
        report = self.processes.add_up(objective.step(packs), self.usage)
        norm = self.processes.clip(self.model, settings.clip)
        report.values["gradient_norm"] = norm
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient is not finite at step {step + 1}; lower the rate or the clip")
        self.optimizer.step()
        after_step(self.usage, settings.losses, settings.rate * factor)
        for modality in MODALITIES:
            if worst := self.usage.imbalance(modality):
                report.values[f"imbalance/{modality}"] = worst
        return report

    def save(self, done: int) -> None:
        parts = self.settings, self.model, self.optimizer, self.usage, self.processes
        save_state(self.state_file, done, *parts)

    def _objective(self) -> Objective:
        settings = self.settings
        common = (self.model, self.samples, settings, self.usage, self.watch, self.processes)
        if settings.stage == "dpo":
            return Preferences(*common, settings.folder / "reference.pt")
        if settings.stage == "grpo":
            rollouts = Rollouts(*common, self.trained.renderer)
            rollouts.num_done = self.first_step
            return rollouts
        return Answers(*common)


def check_rows_fit(samples: Samples, settings: Settings) -> None:
    """A stage whose rows lack what it learns from would run and learn nothing."""
    rows = [samples.row(index) for index in range(len(samples))]
    if settings.stage == "dpo":
        for row in rows:
            if row.rejected is None:
                raise TrainingError(f"{row.source}: dpo needs rows with a rejected answer")
    elif any(row.rejected is not None for row in rows):
        source = next(row.source for row in rows if row.rejected is not None)
        raise TrainingError(f"{source}: a row with a rejected answer; use the stage dpo for it")
    if settings.stage == "thinking" and not any(turn.reasoning for row in rows for turn in row.turns):
        raise TrainingError("the thinking stage needs answers with <think>...</think>, and no row has one")
    if settings.stage == "text" and any(row.media for row in rows):
        source = next(row.source for row in rows if row.media)
        raise TrainingError(f"{source}: a picture in the text stage, whose vision part is frozen; use joint")
    if settings.stage == "vision" and not any(row.media for row in rows):
        raise TrainingError("the vision stage needs rows with pictures, and no row has one")
