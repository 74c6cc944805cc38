"""Adapters: nothing at first, only themselves when trained, the same merged, attached and read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomo.checkpoints.names import pt_shapes
from duomo.errors import CorruptFile, MissingTensor, ShapeMismatch, TrainingError
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.train.lora import LoraPlan, adapters_of, attach, merge
from duomo.train.peft import load_adapter, save_adapter
from tests.tiny import IDS, TINY_TEXT, tiny_model

PLAN = LoraPlan({"attention": 4, "shared": 3, "text_experts": 2, "vision_experts": 1})
# Vision ids among the text send tokens to both banks; no picture is needed for that.
PROMPT = [3, IDS.image_start, IDS.image_patch, IDS.image_patch, IDS.image_end, *range(20, 40)]


def logits_of(model: Ernie) -> Tensor:
    return model.unembed(model(build_batch([PROMPT], model.config), PackedCausal()))


def plain_tensors(model: Ernie) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n.replace(".base.", "."): p.detach().clone() for n, p in named if not _is_factor(n)}


def _is_factor(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("a", "b") or name.endswith(("_a", "_b"))


@pytest.fixture
def trained() -> Iterator[tuple[Ernie, dict[str, Tensor]]]:
    """A model with an adapter after five steps, and the base's tensors before them."""
    model = tiny_model()
    before = plain_tensors(model)
    attach(model, PLAN)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        logits_of(model).logsumexp(-1).mean().backward()
        optimizer.step()
    yield model, before


def test_an_attached_adapter_changes_nothing_yet() -> None:
    model = tiny_model()
    before = logits_of(model)
    adapters = attach(model, PLAN)
    assert torch.allclose(logits_of(model), before, atol=1e-5)
    assert len([name for name in adapters if name.endswith((".text", ".vision"))]) == 4


def test_the_base_stays_to_the_bit_and_every_factor_trains(trained: tuple[Ernie, dict[str, Tensor]]) -> None:
    model, before = trained
    after = plain_tensors(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for adapter in adapters_of(model).values():
        assert all(p.requires_grad for n, p in adapter.named_parameters() if not n.startswith("base."))
    assert any(a.gate_b.any() for a in adapters_of(model).values() if hasattr(a, "gate_b"))


def test_folded_weights_compute_what_thin_products_do(
    trained: tuple[Ernie, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = trained

    def computed() -> list[Tensor]:
        model.zero_grad()
        logits = logits_of(model)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    folded = computed()
    monkeypatch.setattr("duomo.train.lora.FOLDS_UP_TO", 0)
    thin = computed()
    assert len(folded) == len(thin) > 20
    for one, other in zip(folded, thin, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_merged_equals_attached(trained: tuple[Ernie, dict[str, Tensor]]) -> None:
    model, before = trained
    attached = logits_of(model)
    assert (attached - logits_of(tiny_model())).abs().max() > 0.1
    merge(model)
    assert not adapters_of(model) and plain_tensors(model).keys() == before.keys()
    assert torch.allclose(logits_of(model), attached, atol=1e-4)


def test_read_back_equals_written(trained: tuple[Ernie, dict[str, Tensor]], tmp_path: Path) -> None:
    model, _ = trained
    save_adapter(model, PLAN, tmp_path, "tiny")
    other = tiny_model()
    assert load_adapter(other, tmp_path) == PLAN
    assert torch.equal(logits_of(other), logits_of(model))


def test_the_file_names_modules_of_the_pt_layout(
    trained: tuple[Ernie, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, _ = trained
    save_adapter(model, PLAN, tmp_path)
    shapes = pt_shapes(model.config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        module, letter = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        out_size, in_size = shapes[f"{module}.weight"]
        assert tensor.shape[1 if letter == "A" else 0] == (in_size if letter == "A" else out_size)
    assert "base_model.model.model.layers.1.mlp.experts.15.up_proj.lora_B.weight" in tensors
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (4, 8.0)
    assert fields["rank_pattern"]["model.layers.1.mlp.experts.15.up_proj"] == 1


def test_a_damaged_adapter_is_refused(trained: tuple[Ernie, dict[str, Tensor]], tmp_path: Path) -> None:
    save_adapter(trained[0], PLAN, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(MissingTensor):
        load_adapter(tiny_model(), tmp_path)
    save_file({**tensors, name: torch.zeros(1, 1)}, file)
    with pytest.raises(ShapeMismatch):
        load_adapter(tiny_model(), tmp_path)
    file.write_bytes(b"nonsense")
    with pytest.raises(CorruptFile):
        load_adapter(tiny_model(), tmp_path)


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(TrainingError, match="matches nothing"):
        attach(tiny_model(TINY_TEXT), LoraPlan({"vision_experts": 2}))
    with pytest.raises(TrainingError, match="no adapter is possible"):
        attach(tiny_model(), LoraPlan({"routers": 2}))


def test_an_expert_that_gets_no_token_gets_no_gradient() -> None:
    model = tiny_model()
    attach(model, PLAN)
    ids = [5, 6, 7]  # text alone: the vision bank is never run
    model.unembed(model(build_batch([ids], model.config), PackedCausal())).sum().backward()
    for name, adapter in adapters_of(model).items():
        if name.endswith(".vision"):
            assert adapter.gate_b.grad is None  # type: ignore[union-attr]
