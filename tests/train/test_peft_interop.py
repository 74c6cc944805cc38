"""Our adapter opened by PEFT on transformers' class, attached and merged: our logits; and the other way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from duomo.checkpoints import load_model
from duomo.train.lora import LoraPlan, adapters_of, attach
from duomo.train.peft import load_adapter, save_adapter

pytestmark = pytest.mark.oracle
peft = pytest.importorskip("peft", reason="PEFT is not installed here")
IDS = list(range(5, 60))


@pytest.fixture
def theirs() -> Ernie4_5_MoeForCausalLM:
    config = Ernie4_5_MoeConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=48, moe_num_experts=8, moe_num_shared_experts=1, moe_k=2,
        moe_layer_start_index=1, use_bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(config).eval()
    assert isinstance(model, Ernie4_5_MoeForCausalLM)
    return model


def their_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]  # type: ignore[no-any-return]


def test_peft_reads_and_merges_ours(theirs: Ernie4_5_MoeForCausalLM, tmp_path: Path) -> None:
    """Attention alone: PEFT 0.21 takes every gate, up and down of this class for its stacked experts."""
    theirs.save_pretrained(tmp_path / "base")
    ours, plan = load_model(tmp_path / "base"), LoraPlan({"attention": 4}, 1.5)
    attach(ours, plan)
    for adapter in adapters_of(ours).values():
        adapter.b.data.normal_(std=0.2)
    plain = their_logits(theirs)
    wanted = ours.logits(IDS)
    save_adapter(ours, plan, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert (wanted - plain).abs().max() > 0.05
    assert torch.allclose(their_logits(wrapped), wanted, atol=1e-5)
    assert torch.allclose(their_logits(wrapped.merge_and_unload()), wanted, atol=1e-5)


def test_ours_reads_what_peft_wrote(theirs: Ernie4_5_MoeForCausalLM, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], use_rslora=True)
    wrapped = peft.get_peft_model(theirs, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours = load_model(tmp_path / "base")
    assert load_adapter(ours, tmp_path / "adapter") == LoraPlan({"attention": 4}, 3.0)
    assert torch.allclose(ours.logits(IDS), their_logits(wrapped), atol=1e-5)
