"""Every parameter in one group, unknown or empty groups refused, frozen ones unchanged to the bit."""

from __future__ import annotations

import pytest
import torch

from duomo.errors import TrainingError
from duomo.model import PackedCausal, build_batch
from duomo.train.groups import freeze_all_but, group_sizes, optimizer_groups, parameters_by_group
from tests.tiny import TINY_TEXT, tiny_model


def test_groups_cover_the_model_once() -> None:
    model = tiny_model()
    sizes = group_sizes(model)
    assert sum(size.num_values for size in sizes.values()) == sum(p.numel() for p in model.parameters())
    assert sizes["text_experts"].num_tensors == 4  # two layers: gate_up and down
    assert sizes["text_routers"].num_tensors == sizes["vision_routers"].num_tensors == 4  # weight and bias


def test_a_group_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(TrainingError, match="unknown"):
        freeze_all_but(tiny_model(), ["experts"])
    with pytest.raises(TrainingError, match="matches nothing"):
        freeze_all_but(tiny_model(TINY_TEXT), ["vision_experts"])
    with pytest.raises(TrainingError, match="matches nothing"):
        optimizer_groups(tiny_model(TINY_TEXT), 1e-3, {"vision_tower": 0.1}, 0.0)


def test_only_the_named_group_changes() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze_all_but(model, ["text_experts"])
    optimizer = torch.optim.AdamW(optimizer_groups(model, 1e-2, {"text_experts": 0.5}, 0.1))
    assert {g["lr"] for g in optimizer.param_groups} == {0.005}
    ids = list(range(1, 30))
    model.unembed(model(build_batch([ids], model.config), PackedCausal())).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in parameters_by_group(model)["text_experts"]}


def test_the_correction_bias_never_trains() -> None:
    model = tiny_model()
    freeze_all_but(model, ["routers"])
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")} == set()


def test_routers_are_both_modalities() -> None:
    model = tiny_model()
    groups = optimizer_groups(model, 1.0, {"routers": 0.01}, 0.0)
    rates = {str(g["group"]): g["lr"] for g in groups}
    assert rates["text_routers"] == rates["vision_routers"] == 0.01 and rates["attention"] == 1.0
