"""Recipes: overrides, wrong keys named, ERNIEKit's own YAML translated and what it loses said."""

from __future__ import annotations

from pathlib import Path

import pytest

from duomo.errors import TrainingError
from duomo.train.lora import LoraPlan
from duomo.train.settings import coefficient, read_settings, to_fields

PLAIN = {"stage": "sft", "data": "rows.jsonl", "output": "out"}

ERNIEKIT = """
### ERNIEKit's recipe for VL-28B, LoRA 8k, as shipped
stage: VL-SFT
fine_tuning: LoRA
lora_rank: 32
model_name_or_path: base
output_dir: out
train_dataset_path: a.jsonl,b.jsonl
text_dataset_path: c.jsonl
learning_rate: 3e-4
min_lr: 1e-6
lr_scheduler_type: cosine
warmup_steps: 100
weight_decay: 0.1
adam_epsilon: 1e-8
max_steps: 8000
save_steps: 10000
gradient_accumulation_steps: 4
max_seq_len: 8192
moe_gate_lr_ratio: 0.01
vit_lr_ratio: 0.9
moe_aux_loss_lambda: 0.0
moe_use_aux_free_update_coef: 0.0
packing: True
tensor_parallel_degree: 2
recompute: True
"""


def test_overrides_reach_into_sections(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("stage: sft\ndata: [a.jsonl]\noutput: out\nrate: 1e-3\n")
    found = read_settings(
        file, ["lora.ranks.attention=8", "losses.balance={text: 0.1}", "rate=2e-4"]
    ).settings
    assert found.rate == 2e-4 and found.lora is not None and found.lora.ranks == {"attention": 8}
    assert coefficient(found.losses.balance, "text") == 0.1
    assert coefficient(found.losses.balance, "vision") == 0.0
    assert read_settings(to_fields(found)).settings == found


def test_erniekits_keys_are_translated_and_the_rest_is_said(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(ERNIEKIT)
    reading = read_settings(file)
    found = reading.settings
    assert (found.stage, found.steps, found.max_tokens, found.packs_per_step) == ("sft", 8000, 8192, 4)
    assert found.data == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert found.rates == {"routers": 0.01, "vision_tower": 0.9}
    assert found.lora is not None and set(found.lora.ranks.values()) == {32} and found.lora.scale == 2.0
    assert {warning.split()[0] for warning in reading.warnings} == {
        "min_lr", "tensor_parallel_degree", "recompute",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lerning_rate": 1}, "'lerning_rate', which means nothing"),
        ({"step": 5}, "did you mean steps"),
        ({"stage": "sleep"}, "Invalid enum value"),
        ({"steps": "many"}, r"Expected `int`, got `str` - at `\$.steps`"),
        ({"losses": {"ballance": 1}}, "unknown field `ballance`"),
        ({"lora": {}, "train": ["attention"]}, "either lora or train"),
        ({"rate": -1.0}, "above zero"),
        ({"data": []}, "at least one"),
        ({"stage": "grpo"}, "one question a pack"),
    ],
)
def test_a_wrong_recipe_is_named(more: dict[str, object], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        read_settings({**PLAIN, **more})


def test_a_bad_file_or_override_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: [1")
    for recipe, overrides, said in [
        (tmp_path / "none.yaml", [], "cannot be read"),
        (tmp_path / "r.yaml", [], "is no YAML"),
        (PLAIN, ["rate"], "no override"),
    ]:
        with pytest.raises(TrainingError, match=said):
            read_settings(recipe, overrides)  # type: ignore[arg-type]


def test_experts_get_a_sixteenth_of_the_rank() -> None:
    found = read_settings({**PLAIN, "lora": {}}).settings
    assert found.lora is not None and found.lora.ranks == LoraPlan.usual(8)
