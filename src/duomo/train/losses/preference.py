"""Losses of a preferred against a rejected answer: DPO and its relatives (spec 2.4).

All take summed log-probabilities of the pair under the policy and under the reference. IPO and SimPO
average over the tokens of an answer; SimPO needs no reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Pairs:
    """Log-probabilities [S] of chosen and rejected answers, and their lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    def margin(self) -> Tensor:
        """(chosen - rejected) of the policy less that of the reference."""
        return (self.chosen - self.rejected) - (self.reference_chosen - self.reference_rejected)

    def mean_margin(self) -> Tensor:
        """The margin of log-probabilities a token."""
        chosen = (self.chosen - self.reference_chosen) / self.chosen_length
        return chosen - (self.rejected - self.reference_rejected) / self.rejected_length


@dataclass(frozen=True, slots=True)
class Settings:
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_weight: float = 50.0


def _sigmoid(pairs: Pairs, settings: Settings) -> Tensor:
    scaled = settings.beta * pairs.margin()
    smooth = settings.label_smoothing
    return -(1 - smooth) * F.logsigmoid(scaled) - smooth * F.logsigmoid(-scaled)


def _hinge(pairs: Pairs, settings: Settings) -> Tensor:
    return torch.relu(1 - settings.beta * pairs.margin())


def _ipo(pairs: Pairs, settings: Settings) -> Tensor:
    return (pairs.mean_margin() - 1 / (2 * settings.beta)).square()


def _simpo(pairs: Pairs, settings: Settings) -> Tensor:
    margin = pairs.chosen / pairs.chosen_length - pairs.rejected / pairs.rejected_length
    scaled, smooth = settings.beta * margin - settings.simpo_gamma, settings.label_smoothing
    return -(1 - smooth) * F.logsigmoid(scaled) - smooth * F.logsigmoid(-scaled)


def _dpop(pairs: Pairs, settings: Settings) -> Tensor:
    """As sigmoid, and a penalty where the chosen answer becomes less likely than under the reference."""
    loss = torch.relu(pairs.reference_chosen - pairs.chosen)
    return -F.logsigmoid(settings.beta * (pairs.margin() - settings.dpop_weight * loss))


def _kto_pair(pairs: Pairs, settings: Settings) -> Tensor:
    chosen, rejected = pairs.chosen - pairs.reference_chosen, pairs.rejected - pairs.reference_rejected
    chosen_kl, rejected_kl = chosen.mean().clamp(min=0).detach(), rejected.mean().clamp(min=0).detach()
    wins = 1 - torch.sigmoid(settings.beta * (chosen - rejected_kl))
    return (wins + 1 - torch.sigmoid(settings.beta * (chosen_kl - rejected))) / 2


PREFERENCES: dict[str, Callable[[Pairs, Settings], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
    "dpop": _dpop,
    "kto_pair": _kto_pair,
}


def preference_loss(kind: str, pairs: Pairs, settings: Settings | None = None) -> Tensor:
    """Mean over pairs of the loss of that name. TrainingError if there is none of it."""
    if kind not in PREFERENCES:
        raise TrainingError(f"no preference loss {kind!r}; there are {', '.join(PREFERENCES)}", kind=kind)
    return PREFERENCES[kind](pairs, settings or Settings()).mean()


def uses_reference(kind: str) -> bool:
    """SimPO alone compares lengths, not models."""
    return kind != "simpo"
