"""GRPO: answers drawn by our own engine, judged by a rule, the better ones of each question made likelier.

The engine runs over the very parameters that train, driven by hand between steps, so no weights are copied.
Its caches are dropped after every update. The ratio of the clipped surrogate is against the probabilities
the engine drew with, so a difference between the two computations is corrected and not ignored. The loss is
over all tokens of the step alike; a group whose answers are all alike says nothing and is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from duomo.engine.engine import Engine, build_engine, run_all
from duomo.engine.request import MediaBlob, Request, SamplingParams
from duomo.engine.runner import ModelRunner
from duomo.engine.vocabulary import Vocabulary
from duomo.errors import TrainingError
from duomo.model import Ernie
from duomo.processing.prompt import Prompt
from duomo.processing.template import IGNORE
from duomo.train.forward import run_pack
from duomo.train.objectives import StepReport, take_routers
from duomo.train.rewards import reward_named
from duomo.train.routing import RouterWatch, Usage
from duomo.train.samples import Renderer, Sample, Samples
from duomo.train.settings import Settings

if TYPE_CHECKING:
    from duomo.train.processes import Processes

PAGE_SIZE = 16


@dataclass(slots=True)
class Drawn:
    """One answer: its ids, the log-probability each was drawn with, and what it is worth."""

    index: int  # of the sample
    ids: list[int]
    log_probs: list[float]
    text: str
    reward: float = 0.0
    advantage: float = 0.0


class Rollouts:
    """The objective of the stage `grpo`: packs are single questions."""

    def __init__(
        self,
        model: Ernie,
        samples: Samples,
        settings: Settings,
        usage: Usage,
        watch: RouterWatch,
        processes: Processes,
        renderer: Renderer,
    ) -> None:
        self.model, self.samples, self.settings = model, samples, settings
        self.usage, self.watch, self.processes, self.renderer = usage, watch, processes, renderer
        self.reward = reward_named(settings.grpo.reward)
        self.reference = copy.deepcopy(model).requires_grad_(False) if settings.grpo.kl else None
        self.engine = self._build_engine()
        self.num_done = 0  # steps; with the seed, what answers are drawn by

    def step(self, packs: Sequence[Sequence[int]]) -> StepReport:
        asked = self.settings.grpo
        questions = [index for pack in packs for index in pack]
        drawn_here = [self._judge(group) for group in self._draw(questions)]
        groups = _interleaved(self.processes.gather(drawn_here))
        answers = [drawn for group in groups for drawn in group]
        report = StepReport()
        true_reward = sum(drawn.reward for drawn in answers) / len(answers)
        num_right = sum(drawn.reward >= 1 for drawn in answers)
        if asked.shuffled:
            self._shuffle(answers)
        for group in groups:
            _compare(group)
        told = [drawn for drawn in answers if drawn.advantage]
        if self.processes.rank == 0:  # what all know is told once
            report.num_judged, report.num_right = len(answers), num_right
            report.values["true_reward"] = true_reward
            report.values["answer_tokens"] = sum(len(drawn.ids) for drawn in answers) / len(answers)
            report.values["groups_that_differ"] = len({d.index for d in told}) / len(set(questions))
        self._learn(told, report)
        return report

    def _learn(self, answers: list[Drawn], report: StepReport) -> None:
        """The gradient of the step, in passes of at most `max_tokens`, which processes share."""
        total = sum(len(drawn.ids) for drawn in answers)
        gap = 0.0
        for part in self._parts(answers)[self.processes.own]:
            prompts, labels = [], []
            for drawn in part:
                prompt, wanted = _continued(self.samples[drawn.index], drawn.ids)
                prompts.append(prompt)
                labels.append(wanted)
            output = run_pack(self.model, prompts, labels, self.settings.dtype == "bfloat16")
            now_L = output.log_probs()
            drawn_L = torch.tensor([p for drawn in part for p in drawn.log_probs], device=now_L.device)
            gain_L = torch.tensor([d.advantage for d in part for _ in d.ids], device=now_L.device)
            loss = -(surrogate(now_L, drawn_L, gain_L, self.settings.grpo.clip)).sum() / total
            if self.reference is not None:
                with torch.no_grad():
                    before_L = run_pack(self.reference, prompts, labels).log_probs()
                divergence = kl(now_L, before_L).sum() / total
                report.values["kl"] += float(divergence.detach())
                loss = loss + self.settings.grpo.kl * divergence
            share = len(part) / len(answers)
            loss = loss + take_routers(self.watch, self.usage, self.settings, report, 1) * share
            (loss * self.processes.size).backward()
            report.loss += float(loss.detach())
            report.num_tokens += output.num_tokens
            report.num_supervised += len(now_L)
            gap = max(gap, float((now_L.detach() - drawn_L).abs().max()))
        gap = max(self.processes.gather(gap))
        if self.processes.rank == 0 and answers:
            report.values["drawn_gap"] = gap

    def _parts(self, answers: list[Drawn]) -> list[list[Drawn]]:
        parts: list[list[Drawn]] = []
        room = 0
        for drawn in answers:
            size = len(self.samples[drawn.index].prompt.ids) + len(drawn.ids)
            if size > room or not parts:
                parts.append([])
                room = self.settings.max_tokens
            parts[-1].append(drawn)
            room -= size
        return parts

    # ---- drawing ----

    def _draw(self, questions: Sequence[int]) -> list[list[Drawn]]:
        """`group_size` answers to each question that is this process's, in one run of the engine."""
        asked, step = self.settings.grpo, self.num_done
        self.num_done += 1
        self.engine.reset_caches()  # they are of the weights before the last step
        rng = np.random.default_rng([self.settings.seed, 7919, step])
        requests, owners = [], []
        seeds = rng.integers(1 << 62, size=(len(questions), asked.group_size)).tolist()
        mine = list(zip(questions, seeds, strict=True))[self.processes.own]
        for place, (index, seeds_of_question) in enumerate(mine):
            prompt, is_thinking = _question(self.samples[index])
            for number, seed in enumerate(seeds_of_question):
                params = SamplingParams(
                    max_tokens=asked.max_new_tokens,
                    temperature=asked.temperature,
                    top_p=1.0,
                    logprobs=0,
                    seed=seed,
                    thinking="on" if is_thinking else "off",
                )
                name = f"{step}/{place}/{number}"
                requests.append(
                    Request(name, tuple(prompt.ids), params, MediaBlob.all_of(prompt), is_thinking)
                )
                owners.append((place, index))
        outputs = run_all(self.engine, requests)
        groups: list[list[Drawn]] = [[] for _ in mine]
        for request, (place, index) in zip(requests, owners, strict=True):
            found = outputs[request.request_id]
            if found[-1].finish_reason == "error":
                raise TrainingError(f"the engine could not answer: {found[-1].cause}")
            ids = [token for output in found for token in output.token_ids]
            told = [entry.logprob for output in found for entry in output.logprobs]
            groups[place].append(Drawn(index, ids, told, self._answer_text(ids)))
        return groups

    def _answer_text(self, ids: list[int]) -> str:
        end = self.renderer.tokenizer.find_special("</think>")
        said = ids[ids.index(end) + 1 :] if end in ids else ids
        return self.renderer.tokenizer.decode(said)

    def _judge(self, group: list[Drawn]) -> list[Drawn]:
        wanted = self.samples.row(group[0].index).turns[-1].text
        for drawn in group:
            drawn.reward = self.reward(drawn.text, wanted)
        return group

    def _shuffle(self, answers: list[Drawn]) -> None:
        rng = np.random.default_rng([self.settings.seed, 104729, self.num_done])
        given = [answers[int(i)].reward for i in rng.permutation(len(answers))]
        for drawn, reward in zip(answers, given, strict=True):
            drawn.reward = reward

    def _build_engine(self) -> Engine:
        asked = self.settings.grpo
        most = max(self.samples.tokens) + asked.max_new_tokens
        at_once = asked.group_size * self.settings.packs_per_step
        num_pages = -(-most // PAGE_SIZE) * at_once + 1
        runner = ModelRunner(self.model, num_pages, PAGE_SIZE)
        return build_engine(
            runner,
            Vocabulary.of(self.renderer.tokenizer),
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_sequences=at_once,
            max_step_tokens=max(512, most),
            max_model_tokens=most + 1,
        )


def _interleaved(by_process: list[list[list[Drawn]]]) -> list[list[Drawn]]:
    """Groups in the order of their questions, of which each process took every n-th."""
    return [group for row in zip_longest(*by_process) for group in row if group is not None]


def surrogate(now_L: Tensor, drawn_L: Tensor, gain_L: Tensor, clip: float) -> Tensor:
    """min(ratio * gain, clipped ratio * gain), a token: to be made large."""
    ratio = (now_L - drawn_L).exp()
    return torch.minimum(ratio * gain_L, ratio.clamp(1 - clip, 1 + clip) * gain_L)


def kl(now_L: Tensor, before_L: Tensor) -> Tensor:
    """An estimate of KL(now || before) that is never negative: r - 1 - log r, r = before / now."""
    gap = before_L - now_L
    return gap.exp() - 1 - gap


def _compare(group: list[Drawn]) -> None:
    """Rewards of one question to advantages: mean zero, divided by their deviation."""
    rewards = np.array([drawn.reward for drawn in group])
    spread = rewards.std(ddof=1)
    for drawn in group:
        drawn.advantage = float((drawn.reward - rewards.mean()) / (spread + 1e-4)) if spread else 0.0


def _question(sample: Sample) -> tuple[Prompt, bool]:
    """The sample up to where its last answer begins, and whether that is inside an open thinking block."""
    answer = _last_answer(sample.labels)
    prompt = Prompt(sample.prompt.ids[: answer + 1], sample.prompt.media, sample.prompt.spans)
    return prompt, sample.thinks


def _last_answer(labels: Sequence[int]) -> int:
    """The token that predicts the first of the last answer."""
    end = max(index for index, label in enumerate(labels) if label != IGNORE)
    while end > 0 and labels[end - 1] != IGNORE:
        end -= 1
    return end


def _continued(sample: Sample, ids: list[int]) -> tuple[Prompt, list[int]]:
    """The question followed by a drawn answer, every token of which is a label."""
    question, _ = _question(sample)
    prompt = Prompt([*question.ids, *ids[:-1]], question.media, question.spans)
    return prompt, [IGNORE] * (len(question.ids) - 1) + ids
