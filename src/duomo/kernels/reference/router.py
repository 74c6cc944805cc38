"""The router: which K experts of a bank a token takes, and with what weight. fp32 throughout (spec 3.5).

The correction bias decides the choice only; the weights come from the unbiased probabilities. Kept in
bf16 the bias would lose the differences that it exists to make, and other experts would be chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from duomo.kernels.reference.linear import linear


class Routing(NamedTuple):
    """`expert_ids_TK` int64; `weights_TK` in the activations' dtype; `logits_TE` fp32."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor


def route(
    hidden_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_chosen: int, norm_min: float = 1e-12
) -> Routing:
    """Softmax over one bank, top-K of the biased probabilities, unbiased weights that sum to one."""
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logits_TE = linear(hidden_TD.float(), router_ED)
        probabilities_TE = logits_TE.softmax(-1)
        expert_ids_TK = (probabilities_TE + bias_E).topk(num_chosen, dim=-1).indices
        weights_TK = probabilities_TE.gather(-1, expert_ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=norm_min)
    return Routing(expert_ids_TK, weights_TK.to(hidden_TD.dtype), logits_TE)
