"""What transformers 5.23 saves, and what it holds in memory, load to its own logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    PreTrainedModel,
)

from duomo.checkpoints import load_model

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_k": 2, "moe_num_experts": 4}
IDS = [1, 17, 30, 5, 90, 2, 211]


def multimodal(tie: bool) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]}
    text = {
        **SIZES,
        **EXPERTS,
        "moe_intermediate_size": [48, 16],
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": rope,
        "tie_word_embeddings": tie,
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie)
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def text_experts() -> PreTrainedModel:
    return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=48))


def dense() -> PreTrainedModel:
    return Ernie4_5ForCausalLM(Ernie4_5Config(**SIZES, head_dim=32))


BUILDERS = {
    "tied": lambda: multimodal(True),
    "untied": lambda: multimodal(False),
    "text": text_experts,
    "dense": dense,
}


@pytest.fixture(params=BUILDERS)
def theirs(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    model = BUILDERS[request.param]().float().eval()
    with torch.no_grad():  # biases that do change the choice of experts
        for name, tensor in model.state_dict().items():
            if "correction_bias" in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
    return model


def assert_same_logits(theirs: PreTrainedModel, folder: Path) -> None:
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]
    assert (load_model(folder).logits(IDS) - expected).abs().max() <= 1e-5


def test_save_pretrained(theirs: PreTrainedModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    assert_same_logits(theirs, tmp_path)


def test_names_in_memory(theirs: PreTrainedModel, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if any(".mlp.experts." in name for name in tensors):
        pytest.skip("the text class stacks its experts under names of its own, which no file carries")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict(), default=str))
    assert_same_logits(theirs, tmp_path)


def test_vision_weights_arrive(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = multimodal(True).float()
    theirs.save_pretrained(tmp_path)
    ours, state = load_model(tmp_path), theirs.state_dict()
    assert ours.vision_tower is not None and ours.resampler is not None
    last = "model.vision_tower.blocks.1.attn.qkv.weight"
    assert torch.equal(ours.vision_tower.get_parameter("blocks.1.attention.qkv.weight"), state[last])
    merge = "model.resampler_model.temporal_linear.fc2.weight"
    assert torch.equal(ours.resampler.temporal.fc2.weight, state[merge])
    bank = "model.language_model.layers.1.mlp.vision_moe.experts.gate_up_proj"
    assert torch.equal(ours.get_parameter("decoder.layers.1.mlp.vision.gate_up"), state[bank])
