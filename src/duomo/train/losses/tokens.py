"""Cross-entropy of supervised tokens: the plain mean, and ERNIE's token-balanced form.

In the balanced form the value shown is still the mean, while the gradient divides by a constant: a row with
one supervised word behind a large picture no longer pulls harder on that word than a long answer on each of
its own (spec 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from duomo.kernels import cross_entropy

IGNORE = -100


def token_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Mean over labels that are not IGNORE; zero, with a gradient, where there is none."""
    total = cross_entropy(logits_TV.float(), labels_T).sum()
    return total / (labels_T != IGNORE).sum().clamp(min=1)


def summed_token_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over labels that are not IGNORE: what packs of one step add up, to be divided once."""
    return cross_entropy(logits_TV.float(), labels_T).sum()


def token_balanced_loss(logits_TV: Tensor, labels_T: Tensor, tokens_per_step: int) -> Tensor:
    """The mean in value; the gradient of the sum / `tokens_per_step` (max_seq_len * rows)."""
    total = cross_entropy(logits_TV.float(), labels_T).sum()
    mean = total.detach() / (labels_T != IGNORE).sum().clamp(min=1)
    carrier = total / tokens_per_step
    return mean + carrier - carrier.detach()


def sequence_log_probs(logits_STV: Tensor, labels_ST: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of log-probabilities of each row's labels, and how many there are: both [S]."""
    is_label = labels_ST != IGNORE
    chosen = logits_STV.float().log_softmax(-1).gather(-1, labels_ST.clamp(min=0)[..., None])[..., 0]
    return torch.where(is_label, chosen, 0.0).sum(-1), is_label.sum(-1)
