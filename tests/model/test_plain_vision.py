"""The plain tower as one native call: torch's modules say what is right, and what changes stays heard."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from duomo import kernels
from duomo.kernels import DenseForm
from duomo.model import Ernie
from duomo.model.config import VisionConfig
from duomo.model.ernie import init_weights
from duomo.model.lowrank import AdaptedLinear, LowRank
from duomo.model.plain_vision import PlainTower, fuse_vision
from duomo.model.rope import VisionRotationTable, vision_rotation
from duomo.model.vision import VisionTower
from tests.kernels.test_vision import isa
from tests.model.test_packed_vision import PICTURE, VIDEO, WIDE, patches
from tests.tiny import TINY

native = pytest.importorskip("duomo._native", reason="the native module is not built")
pytestmark = pytest.mark.skipif(not kernels.is_native, reason="the native kernels are switched off")
__all__ = ["isa"]

SIZES = [(64, 4, 128), (96, 2, 80), (160, 2, 240)]  # width, heads, width of the MLP
BOUND = {DenseForm.BORROWED: 2e-6, DenseForm.PANELS: 2e-6, DenseForm.ROUNDED: 2e-2}


def plain_model(width: int = 64, num_heads: int = 4, size: int = 128) -> Ernie:
    """Of bf16 values, with norms and biases that are not ones and zeros."""
    vision = VisionConfig(num_layers=3, hidden_size=width, intermediate_size=size, num_heads=num_heads)
    model = init_weights(Ernie(replace(TINY, vision=vision, initializer_range=0.1)), seed=3).eval()
    generator = torch.Generator().manual_seed(width)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.bfloat16().float().requires_grad_(False)


def fused(form: DenseForm, *sizes: int) -> tuple[Ernie, Ernie]:
    """The model with a native tower, and the same in torch."""
    plain = plain_model(*sizes)
    model = deepcopy(plain)
    fuse_vision(model, form)
    assert isinstance(model.vision_tower, PlainTower) and type(plain.vision_tower) is VisionTower
    return model, plain


def error(fast: torch.Tensor, plain: torch.Tensor) -> float:
    assert fast.shape == plain.shape and fast.isfinite().all()
    return float((fast - plain).norm() / plain.norm())


@pytest.fixture(params=list(DenseForm), ids=lambda form: form.name.lower())
def form(request) -> DenseForm:
    return DenseForm(request.param)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("grids", [[PICTURE], [WIDE, PICTURE], [VIDEO], [PICTURE, VIDEO, WIDE]])
@torch.inference_mode()
def test_one_call_gives_the_numbers_of_the_modules(isa, form, sizes, grids):
    model, plain = fused(form, *sizes)
    x = patches(*grids)
    assert error(model.vision_tower(x, grids), plain.vision_tower(x, grids)) < BOUND[form]
    assert model.vision_tower._fused is not None
    assert error(model.encode(x, grids), plain.encode(x, grids)) < BOUND[form]


@torch.inference_mode()
def test_a_picture_has_its_own_bits_in_any_company(isa, form):
    model, _ = fused(form)
    grids = [PICTURE, VIDEO, WIDE]
    x = patches(*grids)
    together = model.encode(x, grids)
    counts = [grid.frames * grid.rows * grid.columns for grid in grids]
    alone = [model.encode(own, [grid]) for own, grid in zip(x.split(counts), grids, strict=True)]
    assert torch.equal(together, torch.cat(alone))


@torch.inference_mode()
def test_every_instruction_set_gives_the_same_bits(form):
    model, _ = fused(form, 96, 2, 80)
    results = []
    for name in ("portable", "avx2", "avx512"):
        native.set_isa(name)
        results.append(model.encode(patches(PICTURE, WIDE), [PICTURE, WIDE]))
    native.set_isa("")
    assert all(torch.equal(results[0], other) for other in results)


def test_gradients_and_bf16_ask_the_modules(form):
    model, plain = fused(form)
    x = patches(PICTURE)
    for own in (model, plain):
        own.requires_grad_(True)
    assert torch.equal(model.encode(x, [PICTURE]), plain.encode(x, [PICTURE])), "gradients are enabled"
    model.encode(x, [PICTURE]).sum().backward()
    assert model.vision_tower.blocks[0].attention.qkv.weight.grad is not None
    with torch.inference_mode():
        assert model.vision_tower._fused_for(x) is not None
        assert model.vision_tower._fused_for(x.bfloat16()) is None


@pytest.mark.parametrize("place", ["vision_tower.blocks.1.fc1", "resampler.spatial.fc2"])
@torch.inference_mode()
def test_an_adapter_is_heard_and_leaves_nothing(form, place):
    model, plain = fused(form)
    x = patches(PICTURE)
    before = model.encode(x, [PICTURE])
    base = model.get_submodule(place)
    rows, columns = base.weight.shape
    low = LowRank(torch.randn(2, columns), torch.randn(rows, 2) * 0.1)
    for own in (model, plain):
        own.set_submodule(place, AdaptedLinear(own.get_submodule(place), low))
    adapted = model.encode(x, [PICTURE])
    if place.startswith("vision_tower."):
        assert model.vision_tower._fused_for(x) is None
    assert error(adapted, plain.encode(x, [PICTURE])) < BOUND[form]
    assert error(adapted, before) > 0.05
    model.set_submodule(place, base)
    assert torch.equal(model.encode(x, [PICTURE]), before)


@torch.inference_mode()
def test_angles_of_patches_are_the_same_bits_out_of_a_table():
    table = VisionRotationTable(plain_model().config.vision)
    for rows, columns in ((1, 1), (13, 70), (200, 3)):
        row_P, column_P = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
        plain = vision_rotation(row_P, column_P, plain_model().config.vision)
        assert all(map(torch.equal, table.rotation(row_P, column_P), plain))


@torch.inference_mode()
def test_borrowed_weights_are_seen_when_written():
    """In place, in another's place, or moved."""
    model, plain = fused(DenseForm.BORROWED)
    x = patches(PICTURE)
    for own in (model, plain):
        own.vision_tower(x, [PICTURE])
    before = plain.vision_tower(x, [PICTURE])
    for change in (
        lambda tower: tower.blocks[0].fc2.weight.mul_(-1.5),
        lambda tower: tower.blocks[2].norm1.bias.add_(0.5),
        lambda tower: setattr(tower.patch_embed, "weight", nn.Parameter(tower.patch_embed.weight * 0.5)),
        lambda tower: setattr(tower.norm.weight, "data", tower.norm.weight.data * -1.2),
    ):
        for own in (model, plain):
            change(own.vision_tower)
        after = plain.vision_tower(x, [PICTURE])
        assert error(model.vision_tower(x, [PICTURE]), after) < 2e-6 < error(after, before)
        before = after


@torch.inference_mode()
def test_copies_make_their_own(form):
    model, _ = fused(form)
    before = model.encode(patches(VIDEO), [VIDEO])
    assert torch.equal(deepcopy(model).encode(patches(VIDEO), [VIDEO]), before)


def test_what_the_kernels_do_not_take_stays_as_it_was():
    model = plain_model(64, 8)  # heads of 8
    fuse_vision(model, DenseForm.BORROWED)
    assert type(model.vision_tower) is VisionTower
    model = plain_model(64, 4, 72)  # an MLP of no whole vectors
    fuse_vision(model, DenseForm.BORROWED)
    assert type(model.vision_tower) is VisionTower
