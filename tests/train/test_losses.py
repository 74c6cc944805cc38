"""Router losses and the bias rule against a calculation by hand."""

from __future__ import annotations

import math

import torch

from duomo.kernels import Routing
from duomo.model import BankConfig
from duomo.model.experts import Router
from duomo.train.joint_stage import balance_loss, router_z_loss, update_bias
from tests.tiny import TINY


def a_router() -> Router:
    router = Router(TINY, BankConfig(3, 16))
    with torch.no_grad():
        router.bias.zero_()
    router.num_chosen = 2
    return router


def test_balance_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    routing = Routing(torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), probabilities.log())
    # counts/S = (1/2, 2/2, 1/2), mean p = (.4, .4, .2): 3 * (.2 + .4 + .1)
    assert math.isclose(float(balance_loss(a_router(), routing)), 2.1, rel_tol=1e-6)


def test_even_routing_costs_the_number_chosen() -> None:
    router = a_router()
    router.num_chosen = 1
    logits = torch.eye(3) * 1e-4
    routing = Routing(torch.arange(3)[:, None], torch.ones(3, 1), logits)
    assert math.isclose(float(balance_loss(router, routing)), 1.0, rel_tol=1e-4)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    wanted = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), logits)
    assert math.isclose(float(router_z_loss(routing)), wanted, rel_tol=1e-6)


def test_the_bias_moves_against_usage() -> None:
    router = a_router()
    ids = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2]])  # 4, 3, 1; the mean is 8/3
    update_bias([(router, Routing(ids, torch.ones(4, 2), torch.zeros(4, 3)))], 0.01)
    assert torch.allclose(router.bias, torch.tensor([-0.01, -0.01, 0.01]))
