"""Training over a 2-bit base: serving's own forward, exact gradients to the inputs, codes untouched."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

from duomo.checkpoints import load_model
from duomo.checkpoints.stream import load_dequantized
from duomo.errors import TrainingError
from duomo.model import Ernie, PackedCausal, build_batch
from duomo.model.packed import unfuse
from duomo.model.packed_layers import PackedExperts, PackedLinear
from duomo.quant import quantize
from duomo.train.frozen import FrozenBank, FrozenLinear, decode, open_packed, product
from duomo.train.loop import finetune

PROMPT = list(range(9, 41))


@pytest.fixture(scope="module")
def two_bits(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_bits") / "model"
    quantize(checkpoint, folder)
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    return folder


def packed_weights(model: nn.Module) -> list[tuple[object, int]]:
    found: list[tuple[object, int]] = []
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            found.append((module.packed, 0))
        elif isinstance(module, FrozenBank):
            found += [(module.gate_up, 1), (module.down, 2)]
    return found


def test_decoding_by_the_kernel_is_the_stored_matrix(two_bits: Path) -> None:
    model = load_model(two_bits)
    assert open_packed(model) > 10
    for weight, index in packed_weights(model):
        stored = weight.stored[index] if getattr(weight, "is_bank", False) else weight.stored
        wanted = torch.from_numpy(stored.decode())
        assert torch.allclose(decode(weight, index), wanted, atol=1e-6 * float(wanted.abs().max()))


def test_forward_is_servings_and_backward_the_decoded_product(two_bits: Path) -> None:
    model = load_model(two_bits)
    unfuse(model)
    served = next(module for module in model.modules() if isinstance(module, PackedLinear))
    x = torch.randn(7, served.packed.columns, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = product(x, served.packed)
    assert torch.equal(y.detach(), served(x.detach()))
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert x.grad is not None and torch.equal(x.grad, gradient @ decode(served.packed))


def test_the_opened_model_answers_as_the_served_one(two_bits: Path) -> None:
    """Native norms and exp() differ from torch's by ulps, which may move an int8 rounding by a step."""
    one, other = load_model(two_bits), load_model(two_bits)
    open_packed(other)
    assert not [m for m in other.modules() if isinstance(m, (PackedLinear, PackedExperts))]
    served, opened = one.logits(PROMPT), other.logits(PROMPT)
    assert (opened - served).norm() / served.norm() < 1e-3


def test_the_gradient_is_near_that_of_the_plain_model(two_bits: Path) -> None:
    """Forward rounds activations to int8, so it is not equal; the direction is."""
    gradients = []
    for model in (load_model(two_bits), load_dequantized(two_bits, torch.float32)):
        open_packed(model)
        gradients.append(_norm_gradient(model))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert cosine > 0.99


def _norm_gradient(model: Ernie) -> torch.Tensor:
    model.requires_grad_(False)
    norms = [p for n, p in model.named_parameters() if n.startswith("decoder") and "norm" in n]
    for parameter in norms:
        parameter.requires_grad_(True)
    logits = model.unembed(model(build_batch([PROMPT], model.config), PackedCausal()))
    torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(PROMPT[1:])).backward()
    return torch.cat([p.grad for p in norms if p.grad is not None])


def test_an_adapter_learns_over_two_bits_and_the_files_stay(
    two_bits: Path, text_rows: Path, tmp_path: Path
) -> None:
    before = {file.name: sha256(file.read_bytes()).digest() for file in two_bits.iterdir()}
    fields = {
        "stage": "sft", "model": str(two_bits), "data": str(text_rows), "output": str(tmp_path / "run"),
        "steps": 12, "rate": 0.02, "max_tokens": 256, "tensorboard": False, "report_every": 3,
        "lora": {"ranks": {"attention": 4, "shared": 4, "text_experts": 2}},
    }  # fmt: skip
    folder = finetune(fields, say=lambda line: None).folder
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert (folder / "adapter_model.safetensors").is_file()
    assert before == {file.name: sha256(file.read_bytes()).digest() for file in two_bits.iterdir()}


def test_packed_codes_do_not_train_by_themselves(two_bits: Path, text_rows: Path, tmp_path: Path) -> None:
    fields = {"stage": "sft", "model": str(two_bits), "data": str(text_rows), "output": str(tmp_path / "run")}
    with pytest.raises(TrainingError, match="packed codes cannot train; give lora"):
        finetune(fields, say=lambda line: None)
