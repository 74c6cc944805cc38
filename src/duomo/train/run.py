"""The training run: stages in order, data made ahead by a worker, progress, checkpoints, resumption.

Every batch is a function of (seed, stage, step, part) and there is no dropout, so model, optimizer and the
step number are the whole state: a run that was killed goes on to the bit. The parts of a step are shared
among processes, or follow one another in one. Time is counted as CPU seconds of all processes and their
workers, since a shared machine makes wall time mean little.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from duomo.errors import TrainingError
from duomo.model import Ernie
from duomo.model.experts import Router
from duomo.processing.tokenizer import Tokenizer
from duomo.tasks.pools import load_pools
from duomo.train import joint_stage, losses, vision_stage
from duomo.train.muon import Muon, is_wide
from duomo.train.parallel import add_up
from duomo.train.precision import fast_products
from duomo.train.recipe import Recipe, Shares, Stage, config_of
from duomo.train.render import Renderer
from duomo.train.routing import RouterWatch

DEV_BATCHES = 6
HEAD_SEED = 67280421310721  # what torch starts from when nobody seeds it
AHEAD = 4  # batches made ahead of the step that takes them


def train(
    recipe: Recipe,
    folder: Path,
    cache_folder: Path,
    say: Callable[[str], None] = print,
    start: tuple[str, dict[str, Tensor]] | None = None,
    device: str = "cpu",
) -> Ernie:
    """Runs or resumes the recipe in `folder`, whose `tokenizer.json` must be there. Returns the model.

    `start` names the stage that a new run begins with, and the weights it begins from. In a group of
    torch.distributed every process calls it with the same arguments, and the first one writes.
    """
    team = Team.here()
    tokenizer = Tokenizer.load(folder)
    model = build_model(tokenizer, recipe.seed, recipe.name)
    head = build_head(model).to(device)
    state = RunState(folder, recipe, team)
    if start is not None and state.is_new:
        state.stage_index = stage_index(recipe, start[0])
        model.load_state_dict(start[1])
    model.to(device)
    run = Run(recipe, folder, cache_folder, say, team, model, head, state)
    for index, stage in enumerate(recipe.stages):
        if state.stage_index > index:
            continue
        optimizer = build_optimizer(model, head, stage, recipe)
        state.restore(index, model, head, optimizer)
        if stage.start and state.step == 0 and (start is None or start[0] != stage.name):
            model.load_state_dict(averaged(folder, stage.start))
        run.stage(stage, optimizer)
        state.finish_stage(index, model, head)
    return model


def stage_index(recipe: Recipe, name: str) -> int:
    names = [stage.name for stage in recipe.stages]
    if name not in names:
        raise TrainingError(f"the recipe has no stage {name!r}; it has {', '.join(names)}")
    return names.index(name)


def averaged(folder: Path, shares: Shares) -> dict[str, Tensor]:
    """The mean of a run's weights at the ends of stages, by share. TrainingError if a stage is missing."""
    total: dict[str, Tensor] = {}
    for stage, share in shares:
        path = folder / f"{stage}.pt"
        if not path.is_file():
            raise TrainingError(
                f"{folder} has no {path.name}; the stage {stage!r} of the run must be finished"
            )
        for name, tensor in torch.load(path, weights_only=True, map_location="cpu").items():
            total[name] = total[name] + share * tensor if name in total else share * tensor
    return total


def build_model(tokenizer: Tokenizer, seed: int, size: str = "tiny") -> Ernie:
    """Normals scaled to each matrix's inputs, so that a shallow and narrow model learns at once."""
    model = Ernie(config_of(size, tokenizer))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name.split(".")[-2]:
                parameter.fill_(0.3 if name == "resampler.norm.weight" else 1.0)
            else:
                scale = 0.08 if name == "embed.weight" else 0.7 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def build_head(model: Ernie) -> vision_stage.CellHead:
    """The throw-away head, from torch's own first seed: the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        return vision_stage.CellHead(model.config.hidden_size)


def build_optimizer(model: Ernie, head: nn.Module, stage: Stage, recipe: Recipe) -> torch.optim.Optimizer:
    """Groups by rate and decay: matrices decay, gains, biases and embeddings do not."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    named = dict(model.named_parameters())
    # The head of the dense stage stays in every optimizer that has a dense loss.
    if stage.is_dense:
        named = {n: p for n, p in named.items() if n.startswith(("vision_tower.", "resampler."))}
    if stage.is_dense or stage.cell_weight:
        named |= {f"head.{n}": p for n, p in head.named_parameters()}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        scale = stage.tower_rate if name.startswith(("vision_tower.", "resampler.")) else 1.0
        decays = parameter.ndim > 1 and name != "embed.weight"
        is_matrix = stage.optimizer == "muon" and decays and is_wide(parameter)
        is_matrix = is_matrix and not name.startswith("head.")
        groups[scale, recipe.weight_decay if decays else 0.0, is_matrix].append(parameter)
    fields = [
        {"params": params, "rate_scale": scale, "weight_decay": decay, "is_matrix": is_matrix}
        for (scale, decay, is_matrix), params in groups.items()
    ]
    kind = Muon if stage.optimizer == "muon" else torch.optim.AdamW
    return kind(fields, lr=stage.rate, betas=(0.9, 0.95))


def rate_at(stage: Stage, step: int) -> float:
    """Linear warmup, flat, then a linear fall to a twentieth."""
    warm = min(1.0, (step + 1) / stage.warmup_steps)
    start = stage.decay_from * stage.num_steps
    fall = min(1.0, max(0.0, (step - start) / (stage.num_steps - start)))
    return stage.rate * warm * (1 - 0.95 * fall)


@dataclass(frozen=True, slots=True)
class Run:
    """What all stages share: the recipe and its folders, the model with its throw-away head, who trains."""

    recipe: Recipe
    folder: Path
    cache_folder: Path
    say: Callable[[str], None]
    team: Team
    model: Ernie
    head: vision_stage.CellHead
    state: RunState

    def stage(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """All steps that are left of it."""
        recipe, model, state = self.recipe, self.model, self.state
        watch = RouterWatch().attach(model)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        source = BatchSource(recipe, stage, self.folder, self.cache_folder, self.team)
        meter = Meter(stage, state.step)
        for step, batches in source.batches(state.step):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(stage, step) * group["rate_scale"]
            optimizer.zero_grad()
            usage: dict[Router, Tensor] = {}
            for batch in batches:
                self._add_gradients(stage, batch, watch, usage, meter)
            self.team.add_up([p.grad for p in parameters])
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            self.team.add_up(list(usage.values()))
            for router, counts_E in usage.items():
                losses.nudge_bias(router, counts_E, recipe.bias_update)
            state.step = step + 1
            if state.step % 20 == 0:
                state.count_time()
                self.say(meter.line(state))
            if state.step % 500 == 0 and not stage.is_dense:
                self.say("  dev: " + dev_line(model, stage, recipe, self.folder, self.cache_folder))
                watch.take()
            state.save_if_due(model, self.head, optimizer)
        for handle in watch.handles:
            handle.remove()

    def _add_gradients(
        self, stage: Stage, batch: Any, watch: RouterWatch, usage: dict[Router, Tensor], meter: Meter
    ) -> None:
        """Those of one part of a step, and how often it chose each expert."""
        recipe = self.recipe
        with fast_products(recipe.bf16, self.model.embed.weight.device):
            loss, score = losses_of(stage, self.model, self.head, batch)
            seen = watch.take()
            total: Tensor = loss
            for router, routing in seen:
                total = total + recipe.balance * losses.balance_loss(router, routing)
                total = total + recipe.router_z * losses.router_z_loss(routing)
            (total / stage.num_parts).backward()
        for router, routing in seen:
            counts_E = losses.usage_of(router, routing)
            usage[router] = usage[router] + counts_E if router in usage else counts_E
        meter.note(float(loss.detach()), score)


def losses_of(stage: Stage, model: Ernie, head: vision_stage.CellHead, batch: Any) -> tuple[Tensor, float]:
    """The dense loss, or that of the answers with the dense one beside it; and the share that was right."""
    if stage.is_dense:
        return vision_stage.cell_loss(model, head, batch)
    questions, cells = batch
    loss, right = joint_stage.answer_loss(model, questions)
    if cells is not None:
        loss = loss + stage.cell_weight * vision_stage.cell_loss(model, head, cells)[0]
    return loss, float(right.float().mean())


@torch.no_grad()
def dev_line(model: Ernie, stage: Stage, recipe: Recipe, folder: Path, cache_folder: Path) -> str:
    """Exact answers by kind on development data, the same at every call."""
    renderer = Renderer(Tokenizer.load(folder))
    pools = load_pools(cache_folder, "dev")
    found: dict[str, list[bool]] = defaultdict(list)
    for index in range(DEV_BATCHES):
        rng = np.random.default_rng([recipe.seed, 999, index])
        batch = joint_stage.example_batch(rng, pools, renderer, stage, 64)
        _, right = joint_stage.answer_loss(model, batch)
        for kind, verdicts in joint_stage.exact_answers(batch, right).items():
            found[kind] += verdicts
    return ", ".join(f"{kind} {100 * np.mean(v):.0f}" for kind, v in sorted(found.items()))


class Meter:
    """Means since the last line, and the time left at the pace so far."""

    def __init__(self, stage: Stage, first_step: int) -> None:
        self.stage, self.first_step, self.started = stage, first_step, time.monotonic()
        self.values: list[float] = []
        self.scores: list[float] = []

    def note(self, loss: float, score: float) -> None:
        self.values.append(loss)
        self.scores.append(score)

    def line(self, state: RunState) -> str:
        pace = (time.monotonic() - self.started) / (state.step - self.first_step)
        left = pace * (self.stage.num_steps - state.step) / 60
        loss, score = np.mean(self.values), np.mean(self.scores)
        self.values, self.scores = [], []
        return (
            f"{self.stage.name} {state.step}/{self.stage.num_steps} loss {loss:.3f} right {100 * score:.1f} %"
            f" {self.stage.batch_size * self.stage.num_parts / pace:.0f} pictures/s,"
            f" CPU {state.cpu_seconds / 60:.1f} min,"
            f" {left:.0f} min left"
        )


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run: each computes its share of a step's parts, with the whole model."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def add_up(self, tensors: Sequence[Tensor | None]) -> None:
        """`parallel.add_up` of those that are there."""
        if self.size > 1:
            add_up([tensor for tensor in tensors if tensor is not None])

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


class RunState:
    """What a resumed run needs, in one file that is replaced atomically."""

    def __init__(self, folder: Path, recipe: Recipe, team: Team) -> None:
        self.path, self.recipe, self.team = folder / "state.pt", recipe, team
        self.stage_index, self.step = 0, 0
        self.cpu_seconds = self.spent_seconds = 0.0
        self.saved_at = time.process_time()
        self.is_new = not self.path.is_file()
        self._loaded: dict[str, Any] | None = None
        if not self.is_new:
            self._loaded = torch.load(self.path, weights_only=True)
            self.stage_index, self.step = self._loaded["stage_index"], self._loaded["step"]
            self.cpu_seconds = self.spent_seconds = self._loaded["cpu_seconds"]
        team.wait()  # nobody writes before all have read

    def restore(
        self, stage_index: int, model: Ernie, head: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._loaded is None:
            return
        model.load_state_dict(self._loaded["model"])
        head.load_state_dict(self._loaded["head"])
        if self._loaded["optimizer"] is not None and stage_index == self.stage_index:
            optimizer.load_state_dict(self._loaded["optimizer"])
        self._loaded = None

    def count_time(self) -> None:
        """Processor time of all processes. Everybody must call it."""
        own, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        used = torch.tensor([own.ru_utime + own.ru_stime + workers.ru_utime + workers.ru_stime]).double()
        self.team.add_up([used])
        self.cpu_seconds = self.spent_seconds + float(used)

    def save_if_due(self, model: Ernie, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.team.rank == 0 and time.process_time() - self.saved_at >= self.recipe.checkpoint_seconds:
            self._save(model, head, optimizer.state_dict())

    def finish_stage(self, stage_index: int, model: Ernie, head: nn.Module) -> None:
        self.stage_index, self.step = stage_index + 1, 0
        self.count_time()
        if self.team.rank == 0:
            self._save(model, head, None)
            name = self.recipe.stages[stage_index].name
            torch.save(model.state_dict(), self.path.with_name(f"{name}.pt"))
        self.team.wait()

    def _save(self, model: Ernie, head: nn.Module, optimizer: dict[str, Any] | None) -> None:
        fields = {
            "stage_index": self.stage_index,
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
            "model": model.state_dict(),
            "head": head.state_dict(),
            "optimizer": optimizer,
            "recipe": json.dumps(asdict(self.recipe)),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(fields, partial)
        os.replace(partial, self.path)
        self.saved_at = time.process_time()


class BatchSource:
    """This process's parts of a stage's steps, made ahead in one other process."""

    def __init__(self, recipe: Recipe, stage: Stage, folder: Path, cache_folder: Path, team: Team) -> None:
        if stage.num_parts % team.size:
            raise TrainingError(
                f"{team.size} processes cannot share the {stage.num_parts} parts of a step of {stage.name!r}"
            )
        self.recipe, self.stage, self.folder, self.cache_folder = recipe, stage, folder, cache_folder
        self.parts = range(team.rank, stage.num_parts, team.size)

    def batches(self, first_step: int) -> Iterator[tuple[int, list[Any]]]:
        arguments = (self.recipe, self.stage, str(self.folder), str(self.cache_folder))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            pending: list[list[Future[Any]]] = []
            for step in range(first_step, self.stage.num_steps):
                while len(pending) < AHEAD and step + len(pending) < self.stage.num_steps:
                    ahead = step + len(pending)
                    pending.append(
                        [worker.submit(make_batch, *arguments, ahead, part) for part in self.parts]
                    )
                yield step, [future.result() for future in pending.pop(0)]


def make_batch(recipe: Recipe, stage: Stage, folder: str, cache_folder: str, step: int, part: int = 0) -> Any:
    """One part of the batch of one step: the same whenever and wherever it is made."""
    rng = np.random.default_rng([recipe.seed, recipe.stages.index(stage), step, *([part] if part else [])])
    pools = load_pools(Path(cache_folder), "train")
    if stage.is_dense:
        return vision_stage.cell_batch(rng, pools, stage, step / stage.num_steps)
    questions = joint_stage.example_batch(rng, pools, _renderer(folder), stage, stage.batch_size)
    cells = vision_stage.cell_batch(rng, pools, stage, 1.0) if stage.cell_weight else None
    return questions, cells


@cache
def _renderer(folder: str) -> Renderer:
    return Renderer(Tokenizer.load(folder))
