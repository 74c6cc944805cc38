"""The family, by name: sizes as Baidu released them (spec section 1.3). `preset("vl-28b-a3b")`.

-Base, -PT, -Paddle and -Thinking variants share these sizes: they differ in training, file layout and
chat template, none of which is a size. The vision width of the 424B is derived: only 1536 gives its count.
"""

from __future__ import annotations

from dataclasses import replace

from duomo.errors import ConfigError
from duomo.model.config import BankConfig, ModelConfig, VisionConfig

_VARIANT_SUFFIXES = ("-thinking", "-base", "-pt", "-paddle")


def preset(name: str) -> ModelConfig:
    """A ModelConfig of the family; `ERNIE-4.5-VL-28B-A3B-PT` and `vl-28b-a3b` spell one."""
    key = name.lower().split("/")[-1].removeprefix("ernie-4.5-")
    while key.endswith(_VARIANT_SUFFIXES):
        key = key[: key.rindex("-")]
    if key not in PRESETS:
        raise ConfigError(f"no preset {name!r}; there are {', '.join(sorted(PRESETS))}", name=name)
    return PRESETS[key]


def _layers(num_layers: int, num_dense: int) -> tuple[bool, ...]:
    return (False,) * num_dense + (True,) * (num_layers - num_dense)


_TEXT_21B = ModelConfig(
    name="21b-a3b",
    vocab_size=103424,
    hidden_size=2560,
    num_layers=28,
    num_heads=20,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=12288,
    expert_layers=_layers(28, 1),
    text_experts=BankConfig(64, 1536),
    num_chosen=6,
    shared_size=2 * 1536,
)
# The text path of the VL model is the 21B's, tensor for tensor.
_VL_28B = replace(
    _TEXT_21B,
    name="vl-28b-a3b",
    vision_experts=BankConfig(64, 512),
    vision=VisionConfig(),
    rope_section=(22, 22, 20),
    initializer_range=0.011410316056095904,
)
_TEXT_300B = ModelConfig(
    name="300b-a47b",
    vocab_size=103424,
    hidden_size=8192,
    num_layers=54,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=28672,
    expert_layers=_layers(54, 3),
    text_experts=BankConfig(64, 3584),
    num_chosen=8,
    tie_embeddings=False,
)
_VL_424B = replace(
    _TEXT_300B,
    name="vl-424b-a47b",
    vision_experts=BankConfig(64, 1536),
    vision=VisionConfig(),
    rope_section=(22, 22, 20),
)
_DENSE_03B = ModelConfig(
    name="0.3b",
    vocab_size=103424,
    hidden_size=1024,
    num_layers=18,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    intermediate_size=3072,
    expert_layers=_layers(18, 18),
)

PRESETS = {config.name: config for config in (_VL_28B, _VL_424B, _TEXT_300B, _TEXT_21B, _DENSE_03B)}
