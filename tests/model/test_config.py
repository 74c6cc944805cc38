"""Both dialects of config.json, the family's sizes, and configs that cannot be right."""

from typing import Any

import pytest
import torch

from duomo.errors import ConfigError
from duomo.model import PRESETS, Ernie, ModelConfig, preset
from tests.tiny import TINY, TINY_DENSE, TINY_TEXT

# Parameters by arithmetic in the specification, sections 1.3 and 6.
FAMILY = {
    "vl-28b-a3b": 29_399_294_336,
    "21b-a3b": 21_825_437_888,
    "vl-424b-a47b": 423_526_285_184,
    "300b-a47b": 299_484_163_264,
    "0.3b": 360_748_032,
}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_family_has_its_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Ernie(preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == FAMILY[name]


@pytest.mark.parametrize("spelling", ["baidu/ERNIE-4.5-VL-28B-A3B-Thinking", "vl-28b-a3b-pt", "VL-28B-A3B"])
def test_variants_name_the_same_sizes(spelling: str) -> None:
    assert preset(spelling) is PRESETS["vl-28b-a3b"]


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no preset '7b'.*vl-28b-a3b"):
        preset("7b")


@pytest.mark.parametrize("config", [TINY, TINY_TEXT, TINY_DENSE, *PRESETS.values()], ids=lambda c: c.name)
def test_baidus_dialect_round_trips(config: ModelConfig) -> None:
    from dataclasses import replace

    assert ModelConfig.from_json(config.to_json()) == replace(config, name="")


def test_the_native_defaults_are_the_28b() -> None:
    from transformers import Ernie4_5_VLMoeConfig

    native = ModelConfig.from_json(Ernie4_5_VLMoeConfig().to_dict())
    ours = preset("vl-28b-a3b")
    assert native.vision == ours.vision
    assert native.ids.video_patch == 103367
    for name in (
        "hidden_size",
        "expert_layers",
        "text_experts",
        "vision_experts",
        "rope_section",
        "shared_size",
    ):
        assert getattr(native, name) == getattr(ours, name)


def _with(**changes: Any) -> dict[str, Any]:
    return {**TINY.to_json(), **changes}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; duomo runs"),
        ({}, "model_type is None"),
        (_with(num_key_value_heads=3), "4 query heads do not divide over 3"),
        (_with(hidden_size=0), "hidden_size is 0; it must be a positive integer"),
        (_with(moe_k=9), "moe_k is 9; the bank has 8 experts"),
        (_with(freq_allocation=3), "rope_section"),
        (_with(head_dim=15), "head_dim is 15"),
        (_with(vision_config={"depth": 2}), "KeyError: 'hidden_size'"),
        (_with(vision_rule="Z"), "'Z' is not a valid VisionRule"),
    ],
)
def test_a_config_that_cannot_be_right(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ModelConfig.from_json(fields)
