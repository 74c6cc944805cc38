"""What the layers of a model read, gathered by running it: second moments per matrix, expert and modality.

Prompts are text or text with pictures; every eighth of each sort is held out, never fitted, only judged on.
Worth knowing: an expert's inputs are weighted by the router's weights, since that is how its errors count,
and an expert that too few tokens choose also hears, at their real weights, tokens that almost chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from duomo import kernels
from duomo.model import Batch, Ernie, build_batch
from duomo.model.experts import ExpertBank
from duomo.model.layers import Linear
from duomo.processing.patches import normalize
from duomo.processing.prompt import Prompt
from duomo.quant.hessian import Gram

BATCH_TOKENS = 2048
HELD_OUT_EVERY = 8
RARE_FACTOR = 4  # an expert with fewer tokens than this times its width hears more


@dataclass(frozen=True)
class CalibrationBatch:
    """Packed prompts of one sort: all fitted or all held out, all with media or none."""

    batch: Batch
    is_held_out: bool
    has_media: bool


def split_prompts(prompts: Sequence[Prompt]) -> Iterator[tuple[bool, bool, list[Prompt]]]:
    """(held out, has media, prompts) of the four sorts; each sort of two or more has one held out."""
    for has_media in (False, True):
        own = [prompt for prompt in prompts if bool(prompt.media) is has_media]
        every = max(2, min(HELD_OUT_EVERY, len(own)))
        held = [prompt for index, prompt in enumerate(own) if index % every == every - 1]
        fitted = [prompt for index, prompt in enumerate(own) if index % every != every - 1]
        yield from ((False, has_media, fitted), (True, has_media, held))


@torch.inference_mode()
def build_batches(
    model: Ernie, prompts: Sequence[Prompt], hear: Callable[[bool], None] = lambda is_held_out: None
) -> list[CalibrationBatch]:
    """Prompts packed to about 2048 tokens, pictures encoded by `model`'s own tower.

    `hear` is told of each sort before its pictures are encoded.
    """
    batches = []
    for is_held_out, has_media, own in split_prompts(prompts):
        hear(is_held_out)
        for group in _groups(own):
            media = [medium for prompt in group for medium in prompt.media]
            features = None
            if media:
                patches = np.concatenate([normalize(medium.patches) for medium in media])
                features = model.encode(torch.from_numpy(patches), [medium.grid for medium in media]).float()
            batch = build_batch([p.ids for p in group], model.config, [p.spans for p in group], features)
            batches.append(CalibrationBatch(batch, is_held_out, has_media))
    return batches


def _groups(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    group: list[Prompt] = []
    for prompt in prompts:
        if group and sum(len(p.ids) for p in group) + len(prompt.ids) > BATCH_TOKENS:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


@dataclass
class BankGrams:
    """Inputs of a bank: per expert, and of the whole layer. `num_tokens` counts real choices only.

    Held-out inputs of gate and up are kept for the whole layer alone (`gate_up` is empty): 28B-sized Hessians
    of every expert, twice, would be most of the memory.
    """

    gate_up: list[Gram]
    down: list[Gram]
    layer: Gram
    num_tokens: list[int] = field(default_factory=list)


class Recorder:
    """Hooks on every Linear and ExpertBank under a module; gathers within `with recorder:`.

    Without `hears_fitted` only linears' held-out inputs are kept, all that rounding to nearest needs. Without
    `hears_near` experts hear the tokens that chose them and no others, as errors are judged.
    """

    def __init__(self, module: nn.Module, hears_fitted: bool = True, hears_near: bool = True) -> None:
        self._module, self._hears_fitted, self._hears_near = module, hears_fitted, hears_near
        self.is_held_out = False
        self.linears: dict[str, tuple[Gram, Gram]] = {}  # fitted, held out
        self.banks: dict[str, tuple[BankGrams, BankGrams]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Recorder:
        for name, part in self._module.named_modules():
            if isinstance(part, Linear):
                self.linears[name] = (Gram(part.weight.shape[1]), Gram(part.weight.shape[1]))
                self._handles.append(part.register_forward_pre_hook(self._hear_linear(name)))
            elif isinstance(part, ExpertBank):
                self.banks[name] = (_bank_grams(part), _bank_grams(part, is_held_out=True))
                self._handles.append(part.register_forward_pre_hook(self._hear_bank(name)))
        return self

    def listen(self, is_held_out: bool) -> None:
        """Which of the two the next inputs belong to."""
        self.is_held_out = is_held_out

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hear_linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._hears_fitted or self.is_held_out:
                self.linears[name][self.is_held_out].add(inputs[0].flatten(0, -2))

        return hear

    def _hear_bank(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hear(bank: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(bank, ExpertBank)
            _gather(bank, inputs[0], self.banks[name][self.is_held_out], self._hears_near)

        return hear


def _bank_grams(bank: ExpertBank, is_held_out: bool = False) -> BankGrams:
    num_experts, width, size = bank.down.shape
    return BankGrams(
        [] if is_held_out else [Gram(width) for _ in range(num_experts)],
        [Gram(size) for _ in range(num_experts)],
        Gram(width),
        [0] * num_experts,
    )


def _gather(bank: ExpertBank, hidden_TD: Tensor, grams: BankGrams, hears_near: bool) -> None:
    router = bank.router
    logits_TE = nn.functional.linear(hidden_TD.float(), router.weight)
    probabilities_TE = logits_TE.softmax(-1)
    ranks_TE = (probabilities_TE + router.bias).argsort(-1, descending=True).argsort(-1)
    chosen_TE = ranks_TE < router.num_chosen
    total_T1 = (probabilities_TE * chosen_TE).sum(-1, keepdim=True).clamp(min=router.norm_min)
    weights_TE = probabilities_TE / total_T1
    grams.layer.add(hidden_TD)
    rare = RARE_FACTOR * bank.down.shape[-1]
    for expert in range(bank.down.shape[0]):
        own_T = chosen_TE[:, expert]
        grams.num_tokens[expert] += int(own_T.sum())
        if hears_near and grams.num_tokens[expert] < rare:
            own_T = ranks_TE[:, expert] < 2 * router.num_chosen
        rows = own_T.nonzero().squeeze(1)
        inputs, weights = hidden_TD[rows], weights_TE[rows, expert]
        if grams.gate_up:
            grams.gate_up[expert].add(inputs, weights)
        inner = kernels.swiglu(nn.functional.linear(inputs, bank.gate_up[expert]))
        grams.down[expert].add(inner, weights)
