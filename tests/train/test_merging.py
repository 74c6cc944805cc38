"""Adapter, merged and merged over 2 bits: the same logits; PEFT's own files read; memory of one shard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duomo import LLM, SamplingParams
from duomo.checkpoints import load_config, load_model
from duomo.checkpoints.adapters import open_adapter, read_adapter
from duomo.checkpoints.stream import load_dequantized
from duomo.errors import CorruptFile, TrainingError, UnexpectedTensor
from duomo.quant import quantize
from duomo.train.lora import LoraBank, LoraLinear, LoraPlan, adapters_of, attach
from duomo.train.merging import sources_of, write_checkpoint
from duomo.train.peft import load_adapter, save_adapter

PROMPT = list(range(9, 41))
PLAN = LoraPlan({"attention": 4, "shared": 3, "text_experts": 2, "resampler": 2, "dense": 2})


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every factor random, so that every module counts."""
    model = load_model(checkpoint)
    attach(model, PLAN)
    generator = torch.Generator().manual_seed(1)
    for wrapped in adapters_of(model).values():
        for name, parameter in wrapped.named_parameters():
            if not name.startswith("base.") and name.endswith("b"):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, PLAN, folder, str(checkpoint))
    return folder


def test_merged_equals_attached_whatever_the_shards(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    plain = model.logits(PROMPT)
    load_adapter(model, adapter)
    attached = model.logits(PROMPT)
    assert (attached - plain).abs().max() > 0.1
    files = write_checkpoint(checkpoint, tmp_path / "merged", adapter, max_shard_bytes=200_000)
    assert len(files) > 5 and not list((tmp_path / "merged").glob("*.partial"))
    merged = load_model(tmp_path / "merged")
    assert torch.allclose(merged.logits(PROMPT), attached, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_two_bit_base_merges_into_what_it_stands_for(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    quantize(checkpoint, tmp_path / "packed")
    write_checkpoint(tmp_path / "packed", tmp_path / "merged", adapter, torch.float32)
    wanted = load_dequantized(tmp_path / "packed", torch.float32)
    load_adapter(wanted, adapter)
    merged = load_model(tmp_path / "merged")
    assert torch.allclose(merged.logits(PROMPT), wanted.logits(PROMPT), atol=1e-5)


def test_an_adapter_of_peft_is_read(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    """Without our field, other prefixes, q and v alone: what is left out adds nothing."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    own = {n: t for n, t in tensors.items() if "q_proj" in n or "v_proj" in n}
    renamed = {n.replace(".model.layers", ".model.language_model.layers"): t for n, t in own.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    model = load_model(checkpoint)
    plan = load_adapter(model, tmp_path)
    assert plan == LoraPlan({"attention": 4}, 2.0)
    attention = model.decoder.layers[0].attention
    assert isinstance(attention.k, LoraLinear) and not attention.k.a.any()
    assert torch.equal(
        attention.q.b, tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    )
    write_checkpoint(checkpoint, tmp_path / "merged", tmp_path)
    assert torch.allclose(load_model(tmp_path / "merged").logits(PROMPT), model.logits(PROMPT), atol=1e-5)


def test_scales_of_peft(adapter: Path) -> None:
    file = open_adapter(adapter)
    assert file.scale("model.layers.1.mlp.experts.3.up_proj") == 2.0  # rank 2 by pattern, alpha 4
    file.fields |= {"use_rslora": True, "alpha_pattern": {}}
    assert file.scale("model.layers.0.self_attn.q_proj") == 8.0 / 2.0


def test_an_expression_gives_the_same_scale_in_service_as_in_merging(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "patterned"))
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["alpha_pattern"] = {r"layers\.[01]\..*q_proj": 12.0, "k_proj": 6.0}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    file = open_adapter(folder)
    served = read_adapter(folder, load_config(checkpoint), torch.float32).linears
    for layer, letter, alpha in (
        (0, "q", 12.0),
        (1, "q", 12.0),
        (2, "q", fields["lora_alpha"]),
        (2, "k", 6.0),
    ):
        pair = file.factors[f"model.layers.{layer}.self_attn.{letter}_proj"]
        expected = pair["B"] * (alpha / pair["A"].shape[0])
        assert torch.equal(served[f"decoder.layers.{layer}.attention.{letter}"].b, expected)


def test_what_does_not_belong_is_refused(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(adapter / "adapter_model.safetensors")
    foreign = {n.replace("layers.0", "layers.77"): t for n, t in tensors.items()}
    save_file(foreign, tmp_path / "other" / "adapter_model.safetensors")
    with pytest.raises(UnexpectedTensor, match=r"layers\.77"):
        load_adapter(load_model(checkpoint), tmp_path / "other")
    with pytest.raises(UnexpectedTensor, match=r"layers\.77"):
        write_checkpoint(checkpoint, tmp_path / "merged", tmp_path / "other")
    with pytest.raises(TrainingError, match="has weights already"):
        write_checkpoint(checkpoint, checkpoint, adapter)
    with pytest.raises(CorruptFile):
        open_adapter(tmp_path)
    with pytest.raises(TrainingError, match="no run, checkpoint or adapter"):
        sources_of(tmp_path)


def test_what_people_point_at(checkpoint: Path, adapter: Path) -> None:
    assert sources_of(checkpoint) == (checkpoint, None)
    assert sources_of(adapter) == (checkpoint, adapter)


def test_every_expert_of_the_bank_is_in_the_file(checkpoint: Path, adapter: Path) -> None:
    model = load_model(checkpoint)
    load_adapter(model, adapter)
    bank = model.decoder.layers[2].mlp.text
    assert isinstance(bank, LoraBank) and bank.up_b.flatten(1).any(1).all()


def test_the_engine_serves_what_training_attached(checkpoint: Path, adapter: Path) -> None:
    """Greedy tokens of `LLM.load_adapter` are those of the model with the adapter attached."""
    model = load_model(checkpoint)
    load_adapter(model, adapter)
    wanted = list(PROMPT)
    for _ in range(6):
        wanted.append(int(model.logits(wanted)[-1].argmax()))
    params = SamplingParams(max_tokens=6, temperature=0.0, thinking="off", ignore_eos=True, logprobs=0)
    with LLM.open(checkpoint) as llm:
        llm.load_adapter("trade", adapter)
        said = llm.generate(PROMPT, params, adapter="trade")
        plain = llm.generate(PROMPT, params)
    assert [entry.token_id for entry in said.logprobs] == wanted[len(PROMPT) :]
    assert [entry.token_id for entry in plain.logprobs] != wanted[len(PROMPT) :]
