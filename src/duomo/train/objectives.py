"""What a step minimises: answers (text, vision, joint, thinking, sft) or preferences (dpo and its relatives).

An objective takes the packs of one step, leaves gradients on the parameters, and says what it saw. Packs of
a step add up exactly: the mean is over all labels of the step, not over means of packs. Of several processes
each takes every n-th pack, n-fold since the mean of gradients is taken, and reports what it saw itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from duomo.model import Ernie
from duomo.train import losses
from duomo.train.forward import PackOutput, run_pack
from duomo.train.losses.preference import Pairs, uses_reference
from duomo.train.losses.preference import Settings as PreferenceNumbers
from duomo.train.routing import RouterWatch, Usage, router_terms
from duomo.train.samples import Sample, Samples
from duomo.train.settings import Settings

if TYPE_CHECKING:
    from duomo.train.processes import Processes


@dataclass(slots=True)
class StepReport:
    """Values of one step, for people: `values` by name, `num_right` of `num_judged`."""

    loss: float = 0.0
    num_tokens: int = 0
    num_supervised: int = 0
    num_right: int = 0
    num_judged: int = 0
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Objective(Protocol):
    def step(self, packs: Sequence[Sequence[int]]) -> StepReport:
        """Gradients of one step, from samples by number."""
        ...


class Answers:
    """Cross-entropy of supervised tokens, and the routers' terms."""

    def __init__(
        self,
        model: Ernie,
        samples: Samples,
        settings: Settings,
        usage: Usage,
        watch: RouterWatch,
        processes: Processes,
    ):
        self.model, self.samples, self.settings = model, samples, settings
        self.usage, self.watch, self.processes = usage, watch, processes

    def step(self, packs: Sequence[Sequence[int]]) -> StepReport:
        settings, report = self.settings, StepReport()
        supervised = sum(self.samples.supervised[index] for pack in packs for index in pack)
        divisor = settings.max_tokens * len(packs) if settings.losses.token_balanced else max(1, supervised)
        for pack in packs[self.processes.own]:
            chosen = [self.samples[index] for index in pack]
            output = self._forward(chosen)
            summed = losses.summed_token_loss(output.logits_LV, output.labels_L)
            total = summed / divisor + self._routers(report, len(packs))
            (total * self.processes.size).backward()
            report.loss += float(summed.detach()) / max(1, supervised)
            _count(report, output)
        return report

    def _forward(self, chosen: Sequence[Sample]) -> PackOutput:
        prompts, labels = [s.prompt for s in chosen], [s.labels for s in chosen]
        return run_pack(
            self.model, prompts, labels, self.settings.dtype == "bfloat16", self.processes.is_parted
        )

    def _routers(self, report: StepReport, num_packs: int) -> Tensor:
        return take_routers(self.watch, self.usage, self.settings, report, num_packs)


class Preferences:
    """A preferred answer against another; the reference is the model as the run found it."""

    def __init__(
        self,
        model: Ernie,
        samples: Samples,
        settings: Settings,
        usage: Usage,
        watch: RouterWatch,
        processes: Processes,
        reference_file: Path,
    ) -> None:
        self.model, self.samples, self.settings = model, samples, settings
        self.usage, self.watch, self.processes = usage, watch, processes
        asked = settings.preference
        self.numbers = PreferenceNumbers(
            asked.beta, asked.label_smoothing, asked.simpo_gamma, asked.dpop_weight
        )
        self.reference = torch.zeros(len(samples), 2)
        if uses_reference(asked.loss):
            self.reference = self._read_or_make(reference_file)

    def step(self, packs: Sequence[Sequence[int]]) -> StepReport:
        asked, report = self.settings.preference, StepReport()
        num_pairs = sum(len(pack) for pack in packs)
        for pack in packs[self.processes.own]:
            output, pairs = self._pairs(pack)
            value = losses.preference_loss(asked.loss, pairs, self.numbers)
            share = len(pack) / num_pairs
            total = value * share
            if asked.answer_weight:
                answer = -(pairs.chosen / pairs.chosen_length).mean() * share
                total = total + asked.answer_weight * answer
            total = total + take_routers(self.watch, self.usage, self.settings, report, len(packs))
            (total * self.processes.size).backward()
            report.loss += float(value.detach()) * share
            margin = pairs.margin().detach()
            report.values["margin"] += float(margin.mean()) * share
            shift = (pairs.chosen - pairs.reference_chosen).detach().mean()
            report.values["chosen_shift"] += float(shift) * share
            report.num_tokens += output.num_tokens
            report.num_supervised += output.labels_L.numel()
            report.num_right += int((margin > 0).sum())
            report.num_judged += len(pack)
        return report

    def _pairs(self, pack: Sequence[int]) -> tuple[PackOutput, Pairs]:
        prompts, labels = [], []
        for sample in (self.samples[index] for index in pack):
            assert sample.rejected is not None, "checked when the run opened"
            # Both answers of a pair follow the same picture; the tower runs for each.
            prompts += [sample.prompt, sample.rejected.prompt]
            labels += [sample.labels, sample.rejected.labels]
        output = run_pack(self.model, prompts, labels, self.settings.dtype == "bfloat16")
        sums = output.by_sequence(output.log_probs()).unflatten(0, (-1, 2))
        lengths = output.by_sequence(torch.ones_like(output.labels_L).float()).unflatten(0, (-1, 2))
        reference = self.reference[list(pack)].to(sums.device)
        return output, Pairs(*sums.unbind(1), *reference.unbind(1), *lengths.unbind(1))

    @torch.no_grad()
    def _read_or_make(self, file: Path) -> Tensor:
        """Log-probabilities [samples, 2] under the model before its first step; kept for a resumed run."""
        if file.is_file():
            found: Tensor = torch.load(file, weights_only=True)
            return found
        own = {index: self._sums(index) for index in range(len(self.samples))[self.processes.own]}
        sums = {index: pair for part in self.processes.gather(own) for index, pair in part.items()}
        made = torch.tensor([sums[index] for index in range(len(self.samples))]).reshape(-1, 2)
        if self.processes.rank == 0:
            torch.save(made, file)
        return made

    def _sums(self, index: int) -> tuple[float, float]:
        _, pairs = self._pairs([index])
        return float(pairs.chosen[0]), float(pairs.rejected[0])


def take_routers(
    watch: RouterWatch, usage: Usage, settings: Settings, report: StepReport, num_packs: int
) -> Tensor:
    """The routers' terms of the pass just made, as the step's share; usage is counted beside."""
    seen = watch.take()
    usage.add(seen)
    terms = router_terms(seen, usage.places, settings.losses)
    for name, term in terms.items():
        report.values[name] += float(term.detach()) / num_packs
    return torch.stack(list(terms.values())).sum() / num_packs if terms else torch.zeros(())


def _count(report: StepReport, output: PackOutput) -> None:
    report.num_tokens += output.num_tokens
    report.num_supervised += output.labels_L.numel()
    report.num_right += int(output.right_L().sum())
    report.num_judged += output.labels_L.numel()
