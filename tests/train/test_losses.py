"""Router losses and the bias rule against a calculation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from duomo.errors import TrainingError
from duomo.kernels import Routing
from duomo.model import BankConfig
from duomo.model.experts import Router
from duomo.train.losses import (
    balance_loss,
    nudge_bias,
    orthogonality_loss,
    orthogonality_step,
    preference_loss,
    router_z_loss,
    sequence_log_probs,
    token_balanced_loss,
    token_loss,
    usage_of,
)
from duomo.train.losses.preference import Pairs, Settings
from duomo.train.losses.tokens import IGNORE
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
    usage = usage_of(router, Routing(ids, torch.ones(4, 2), torch.zeros(4, 3)))
    assert usage.tolist() == [4, 3, 1]
    nudge_bias(router, usage, 0.01)
    moved = torch.tensor([-0.01, -0.01, 0.01])
    assert torch.allclose(router.bias, moved - moved.mean())  # only differences choose


def test_a_collapse_in_each_modality_cannot_hide_in_the_other() -> None:
    """Text on experts 0-3 and vision on 4-7: read together it looks even (2.0), apart it costs 4.0 each."""
    router = Router(TINY, BankConfig(8, 16))
    router.num_chosen = 2

    def collapsed(first: int) -> Routing:
        logits = torch.full((60, 8), -30.0)
        pairs = torch.combinations(torch.arange(first, first + 4), 2).repeat(10, 1)
        logits[:, first : first + 4] = 0.0
        logits.scatter_(1, pairs, 1e-4)
        return Routing(pairs, torch.ones(60, 2), logits)

    text, vision = collapsed(0), collapsed(4)
    assert math.isclose(float(balance_loss(router, text)), 4.0, rel_tol=1e-3)
    assert math.isclose(float(balance_loss(router, vision)), 4.0, rel_tol=1e-3)
    mixed = Routing(*(torch.cat(pair) for pair in zip(text, vision, strict=True)))
    assert math.isclose(float(balance_loss(router, mixed)), 2.0, rel_tol=1e-3)


def test_orthogonality_by_hand_and_decoupled() -> None:
    weight = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    # cosine 1/sqrt(2) off the diagonal, twice: 2 * 1/2 / 4
    assert math.isclose(float(orthogonality_loss(weight)), 0.25, rel_tol=1e-6)
    router = a_router()
    with torch.no_grad():
        router.weight.copy_(torch.randn(3, TINY.hidden_size, generator=torch.Generator().manual_seed(0)) + 1)
    before = orthogonality_loss(router.weight).item()
    for _ in range(200):
        orthogonality_step(router, 5.0)
    assert orthogonality_loss(router.weight).item() < 0.1 * before
    assert router.weight.grad is None


def test_token_balanced_gradients_do_not_depend_on_the_row() -> None:
    """A row with one label and a row with four: the gradient of each label is the same."""
    found = []
    for num_labels in (1, 4):
        logits = torch.zeros(4, 3, requires_grad=True)
        labels = torch.full((4,), IGNORE)
        labels[:num_labels] = 1
        loss = token_balanced_loss(logits, labels, tokens_per_step=8)
        assert math.isclose(loss.item(), math.log(3), rel_tol=1e-6)
        assert math.isclose(loss.item(), token_loss(logits, labels).item(), rel_tol=1e-6)
        loss.backward()
        assert logits.grad is not None
        found.append(logits.grad[0])
    assert torch.allclose(found[0], found[1], atol=1e-7)
    assert torch.allclose(found[0], torch.tensor([1 / 3, -2 / 3, 1 / 3]) / 8)


def test_no_labels_cost_nothing() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    token_loss(logits, torch.full((2,), IGNORE)).backward()
    assert logits.grad is not None and not logits.grad.any()


def test_sequence_log_probs_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
    total, count = sequence_log_probs(logits, torch.tensor([[IGNORE, 1]]))
    assert math.isclose(total.item(), math.log(0.75), rel_tol=1e-6) and count.item() == 1


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("sigmoid", -math.log(1 / (1 + math.exp(-0.5 * 2)))),
        ("hinge", 0.0),
        ("ipo", ((1 / 2 - -1 / 4) - 1) ** 2),
        ("simpo", -math.log(1 / (1 + math.exp(-(0.5 * (-4 / 2 - -8 / 4) - 0.5))))),
        ("dpop", -math.log(1 / (1 + math.exp(-0.5 * 2)))),
    ],
)
def test_preferences_by_hand(kind: str, wanted: float) -> None:
    """chosen -4 (reference -5, 2 tokens), rejected -8 (reference -7, 4 tokens): margin 2, beta 0.5."""
    pairs = Pairs(*(torch.tensor([v]) for v in (-4.0, -8.0, -5.0, -7.0, 2.0, 4.0)))
    assert math.isclose(float(preference_loss(kind, pairs, Settings(beta=0.5))), wanted, abs_tol=1e-6)


def test_dpop_punishes_a_chosen_answer_that_became_less_likely() -> None:
    pairs = Pairs(*(torch.tensor([v]) for v in (-6.0, -9.0, -5.0, -7.0, 2.0, 4.0)))
    wanted = -math.log(1 / (1 + math.exp(-0.5 * (1 - 50 * 1))))
    assert math.isclose(float(preference_loss("dpop", pairs, Settings(beta=0.5))), wanted, rel_tol=1e-5)


def test_an_unknown_preference_is_refused() -> None:
    with pytest.raises(TrainingError, match="sigmoid"):
        preference_loss("dpo2", Pairs(*[torch.zeros(1)] * 6))
