"""Router terms, one bank at a time: load balance, z, orthogonality, and the bias that has no loss (spec 2.1).

A bank is one modality, so a collapse of text cannot be hidden by vision using the other experts, which is
what happens when both are counted in the same bins.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from duomo.kernels import Routing
from duomo.model.experts import Router


def balance_loss(router: Router, routing: Routing) -> Tensor:
    """E * sum_e (count_e/S) * mean_s p_e, counts of the un-biased choice: K when even, more when not."""
    probabilities_TE = routing.logits_TE.softmax(-1)
    chosen = probabilities_TE.topk(router.num_chosen, dim=-1).indices
    num_experts = probabilities_TE.shape[-1]
    counts_E = torch.bincount(chosen.flatten(), minlength=num_experts).float() / chosen.shape[0]
    return (counts_E * probabilities_TE.mean(0)).sum() * num_experts


def router_z_loss(routing: Routing) -> Tensor:
    """Mean of logsumexp squared: keeps logits small enough for their softmax to stay precise."""
    return routing.logits_TE.logsumexp(-1).square().mean()


def orthogonality_loss(weight_ED: Tensor) -> Tensor:
    """||W W' - I||^2 / E^2 with W's rows (one an expert) of length one: experts look at different things."""
    unit = F.normalize(weight_ED, dim=-1, eps=1e-12)
    identity = torch.eye(unit.shape[0], dtype=unit.dtype, device=unit.device)
    return (unit @ unit.T - identity).square().sum() / unit.shape[0] ** 2


@torch.no_grad()
def orthogonality_step(router: Router, rate: float) -> None:
    """The decoupled form: one step down the loss after the optimizer's, outside of its moments."""
    with torch.enable_grad():
        weight = router.weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(orthogonality_loss(weight), weight)
    router.weight.sub_(gradient, alpha=rate)


@torch.no_grad()
def nudge_bias(router: Router, usage_E: Tensor, rate: float) -> None:
    """Raises the bias of experts used less than the mean and lowers that of the others, by one step.

    Biases keep a mean of zero: only their differences choose, and a common drift would cost their precision.
    """
    usage_E = usage_E.to(router.bias.device)
    router.bias.add_(torch.sign(usage_E.mean() - usage_E), alpha=rate)
    router.bias.sub_(router.bias.mean())


def usage_of(router: Router, routing: Routing) -> Tensor:
    """[E]: how often one pass chose each expert."""
    return torch.bincount(routing.expert_ids_TK.flatten(), minlength=router.bias.numel()).float()
