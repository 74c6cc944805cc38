"""Adapters over packed weights: what the unpacked weights with the product merged in would say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duomo.checkpoints.adapters import read_adapter
from duomo.model import Ernie, build_batch
from duomo.model.attention import PackedCausal
from duomo.model.lowrank import AdaptedAttention, AdaptedBank, AdaptedLinear, AdaptedMLP, adapted
from duomo.model.packed import _fuse, build_packed
from tests.engine.test_adapters import merged, write_adapter
from tests.model.test_packed import CONFIG, stored, unpacked

__all__ = ["stored"]
IDS = [[1, 7, 100295, 42, 9, 9, 100295], [5, 5, 6]]


def put(model: Ernie, modules: dict[str, torch.nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


@torch.inference_mode()
def hidden(model: Ernie, prompts: list[list[int]]) -> torch.Tensor:
    return model(build_batch(prompts, model.config), PackedCausal())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), CONFIG)


@pytest.fixture(params=["apart", "fused"])
def packed(stored, request: pytest.FixtureRequest) -> Ernie:
    model = build_packed(CONFIG, stored.items())
    if request.param == "fused":
        _fuse(model)
    return model


def test_over_two_bits_it_is_near_the_same_weights_unpacked_and_merged(packed, stored, folder):
    plain = hidden(packed, IDS)
    put(packed, adapted(packed, read_adapter(folder, CONFIG, torch.float32)))
    found, expected = hidden(packed, IDS), hidden(merged(unpacked(stored), folder), IDS)
    assert (found - expected).norm() / expected.norm() < 0.05 < (found - plain).norm() / plain.norm()


def test_a_row_is_the_same_alone(packed, folder):
    put(packed, adapted(packed, read_adapter(folder, CONFIG, torch.float32)))
    together = hidden(packed, IDS)
    assert torch.equal(together, torch.cat([hidden(packed, [ids]) for ids in IDS]))


def test_every_kind_of_packed_module_has_its_twin(stored, folder):
    kinds = set()
    for fuse in (lambda model: None, _fuse):
        model = build_packed(CONFIG, stored.items())
        fuse(model)
        kinds |= {type(m) for m in adapted(model, read_adapter(folder, CONFIG, torch.float32)).values()}
    assert kinds == {AdaptedBank, AdaptedAttention, AdaptedMLP, AdaptedLinear}


def test_in_bfloat16_a_mixed_batch_has_the_values_of_merged_weights(stored, folder):
    """Text and vision tokens of two prompts; merged in fp32 is the oracle, bf16's rounding the distance."""
    model = build_packed(CONFIG, stored.items(), torch.bfloat16)
    plain = hidden(model, IDS)
    put(model, adapted(model, read_adapter(folder, CONFIG, torch.bfloat16)))
    found, expected = hidden(model, IDS), hidden(merged(unpacked(stored), folder), IDS)
    assert found.dtype == torch.bfloat16
    assert distance(found, expected) < 0.1 < distance(plain, expected)
    for row, (own, wanted) in enumerate(zip(found, expected, strict=True)):
        assert distance(own, wanted) < 0.2, f"row {row}, which no other may outweigh"
    assert torch.equal(found, torch.cat([hidden(model, [ids]) for ids in IDS])), "alone and together"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative."""
    return float((found.float() - expected).norm() / expected.norm())
