"""What ERNIE-4.5-VL computes: one model, sizes from its config, weights from a checkpoint."""

from duomo.model.attention import PackedCausal, PlainCache
from duomo.model.config import BankConfig, ModelConfig, SpecialIds, VisionConfig, VisionRule
from duomo.model.ernie import Ernie, init_weights
from duomo.model.inputs import Batch, KVCache, build_batch
from duomo.model.positions import build_positions, token_routes
from duomo.model.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "BankConfig",
    "Batch",
    "Ernie",
    "KVCache",
    "ModelConfig",
    "PackedCausal",
    "PlainCache",
    "SpecialIds",
    "VisionConfig",
    "VisionRule",
    "build_batch",
    "build_positions",
    "init_weights",
    "preset",
    "token_routes",
]
