"""The last mixture of wanted tokens alone: the same states and gradients, and routers that see all tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from duomo.model import Ernie, ModelConfig, PackedCausal, build_batch
from duomo.model.experts import Router
from duomo.train.lora import LoraPlan, attach
from tests.tiny import IDS, TINY, TINY_DENSE, TINY_TEXT, tiny_model

WANTED = torch.tensor([3, 4, 9, 17, 20])
TOKENS = 23


def states_and_gradients(model: Ernie, wanted_first: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = [5, IDS.image_patch, IDS.image_patch, *range(6, 16)], list(range(30, 40))
    batch = build_batch(ids, model.config)
    assert len(batch.ids_T) == TOKENS
    model.zero_grad()
    if wanted_first:
        states = model(replace(batch, logit_rows=WANTED), PackedCausal())
    else:
        states = model(batch, PackedCausal())[WANTED]
    model.unembed(states).square().mean().backward()
    return states.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Ernie) -> None:
    ours, plain = states_and_gradients(model, True), states_and_gradients(model, False)
    torch.testing.assert_close(ours[0], plain[0])
    assert ours[1].keys() == plain[1].keys()  # a bank of which nothing is wanted has gradients of zero
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("config", [TINY, TINY_TEXT, TINY_DENSE])
def test_states_and_gradients(config: ModelConfig) -> None:
    assert_same(tiny_model(config))


@pytest.mark.parametrize("folds", [True, False])
def test_adapters(folds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomo.train.lora.FOLDS_UP_TO", 1 << 20 if folds else 0)
    model = tiny_model()
    for adapter in attach(model, LoraPlan(ranks={"text_experts": 4, "shared": 4}, scale=1.0)).values():
        for name, parameter in adapter.named_parameters():
            if name.endswith("b"):
                torch.nn.init.normal_(parameter, std=0.05)
    assert_same(model)


def test_routers_see_every_token() -> None:
    model, seen = tiny_model(), []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *call: seen.append(len(call[-1].logits_TE)))
    states_and_gradients(model, True)
    assert seen == 2 * [TOKENS - 2, 2]
