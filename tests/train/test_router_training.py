"""From collapsed routers: each modality's balance recovers, by the loss and by the bias without one."""

from __future__ import annotations

import pytest
import torch

from duomo.model import BankConfig
from duomo.model.experts import Router
from duomo.train.losses import balance_loss, nudge_bias, orthogonality_loss
from tests.tiny import TINY

NUM_EXPERTS, CHOSEN = 8, 2


def fallen(seed: int) -> tuple[Router, torch.Tensor]:
    """A router that sends all 400 tokens to the first four experts, and the tokens."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(TINY, BankConfig(NUM_EXPERTS, 16))
    tokens = torch.randn(400, TINY.hidden_size, generator=generator) + 0.5
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.05)
        router.weight[:4] += 0.05
        router.weight[4:] -= 0.05
        router.bias.zero_()
    router.num_chosen = CHOSEN
    return router, tokens


@pytest.mark.parametrize("modality", [0, 1])
def test_the_balance_loss_recovers_a_collapse(modality: int) -> None:
    router, tokens = fallen(modality)
    assert balance_loss(router, router(tokens)) > 1.9 * CHOSEN
    optimizer = torch.optim.Adam([router.weight], lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        balance_loss(router, router(tokens)).backward()
        optimizer.step()
    assert balance_loss(router, router(tokens)) < 1.2 * CHOSEN


def test_the_bias_alone_recovers_it_and_the_weights_stay() -> None:
    router, tokens = fallen(2)
    weight = router.weight.detach().clone()

    def usage() -> torch.Tensor:
        return torch.bincount(router(tokens).expert_ids_TK.flatten(), minlength=NUM_EXPERTS).float()

    assert usage().max() > 1.9 * usage().mean()
    for _ in range(300):
        nudge_bias(router, usage(), 0.01)
    found = [usage()]
    for _ in range(10):
        nudge_bias(router, usage(), 0.001)
        found.append(usage())
    assert min(float(u.max() / u.mean()) for u in found) < 1.5
    assert torch.equal(router.weight, weight)


def test_orthogonality_inside_the_loss_halves_the_cosine() -> None:
    router, _ = fallen(3)

    def cosine() -> float:
        unit = torch.nn.functional.normalize(router.weight.detach(), dim=-1)
        return float((unit @ unit.T)[~torch.eye(NUM_EXPERTS, dtype=torch.bool)].abs().mean())

    before = cosine()
    optimizer = torch.optim.Adam([router.weight], lr=0.005)
    for _ in range(100):
        optimizer.zero_grad()
        orthogonality_loss(router.weight).backward()
        optimizer.step()
    assert cosine() < 0.5 * before
